"""Documents that are nearly the same: a licence header apart, another version of a file, a few renamed variables.

MinHash: a document is the set of its runs of five words. Each of 128 hash functions keeps its smallest value over the
set; two documents agree in about as many of them as their sets overlap (Jaccard). Sketches are made by many processes
and compared in one, in a fixed order: held-out documents first, so that no near-copy of one of them is trained on; of
other near-copies the first stays. A document takes about 5 kB of memory here, the only thing in `puna prepare` that
grows with the corpus. Needs datasketch, an extra of puna.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import xxhash

from puna.errors import PunaError

#: Overlap from which on two documents count as the same.
THRESHOLD = 0.85

FUNCTIONS = 128

_WORD = re.compile(r"\w+")
_RUN = 5
_RUNS_AT_ONCE = 4096  # bounds the table of runs by functions


def sketch(text: str) -> np.ndarray:
    """The smallest hashes of a document's runs of words, (FUNCTIONS,) uint32.

    Raises:
        PunaError: datasketch is not installed.
    """
    words = _WORD.findall(text)
    runs = sorted({" ".join(words[i : i + _RUN]).encode() for i in range(max(len(words) - _RUN + 1, 1))})
    minhash = _empty_minhash().copy()
    for start in range(0, len(runs), _RUNS_AT_ONCE):
        minhash.update_batch(runs[start : start + _RUNS_AT_ONCE])
    return minhash.hashvalues.astype(np.uint32)


def near_copies(sketches: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, int]]:
    """Goes through documents in order and finds those too near to one that stays.

    Args:
        sketches: number and sketch of each document.

    Yields:
        Number of the copy, number of the first document that stays and that it is a copy of.
    """
    index = _datasketch().MinHashLSH(threshold=THRESHOLD, num_perm=FUNCTIONS)
    kept: dict[int, np.ndarray] = {}
    for number, hashes in sketches:
        minhash = _empty_minhash().copy()
        minhash.hashvalues = hashes
        alike = [other for other in sorted(index.query(minhash)) if np.mean(kept[other] == hashes) >= THRESHOLD]
        if alike:
            yield number, alike[0]
        else:
            index.insert(number, minhash)
            kept[number] = hashes


@functools.cache
def _empty_minhash() -> Any:
    """A sketch of nothing; drawing its hash functions takes longer than copying it."""
    return _datasketch().MinHash(num_perm=FUNCTIONS, seed=1, hashfunc=xxhash.xxh32_intdigest)


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError:
        raise PunaError("near-duplicates need datasketch: pip install datasketch") from None
    return datasketch
