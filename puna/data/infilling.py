"""Which documents are cut for infilling, and where: what Code Llama does in training.

A document becomes prefix, middle and suffix at two characters drawn at random; the model then reads prefix and suffix
and learns to write the middle. Every draw is a hash of (seed, document id), so a cut does not change with the order of
documents, the number of processes, or what else is in the corpus.

    "def f(x):⏎    return x⏎"   ─▶   prefix "def f(x)"   middle ":⏎    ret"   suffix "urn x⏎"

Source: Code Llama (arXiv:2308.12950), section 2.3: 0.9 of the documents that a row holds whole are cut, at characters,
half prefix-suffix-middle (PSM), half suffix-prefix-middle (SPM). `puna.prompts` spells both layouts.
"""

from typing import NamedTuple

import xxhash

from puna.prompts.infilling import Order


class Cut(NamedTuple):
    """A document in three parts, and their order in training."""

    prefix: str
    middle: str
    suffix: str
    order: Order


def cut_for_infilling(text: str, *, seed: int, id: str, fim_rate: float, spm_rate: float) -> Cut | None:
    """The parts of a document, or None if it stays whole.

    Args:
        text: the document.
        seed: of the data set.
        id: the document's.
        fim_rate: share of documents that are cut.
        spm_rate: share of these in the order SPM.
    """
    if draw(seed, id, "cut") >= fim_rate:
        return None
    places = (int(draw(seed, id, which) * (len(text) + 1)) for which in ("one end", "other end"))
    start, stop = sorted(places)
    order: Order = "spm" if draw(seed, id, "order") < spm_rate else "psm"
    return Cut(text[:start], text[start:stop], text[stop:], order)


def draw(seed: int, id: str, which: str) -> float:
    """A number in [0, 1), uniform over ids.

    Args:
        seed: of the data set.
        id: the document's.
        which: what is drawn for.
    """
    return (xxhash.xxh3_64_intdigest(f"{seed}\n{which}\n{id}".encode()) >> 11) * 2.0**-53
