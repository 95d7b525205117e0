"""Infilling: what stands before and after a gap, laid out so that the model goes on with what belongs into it.

    psm    BOS PRE encode(prefix) SUF encode(suffix)* MID | encode(middle)* EOT
    spm    BOS PRE SUF encode(suffix)* MID encode(prefix  |  + middle) EOT

`*`: without the space that SentencePiece puts in front of a text. The prompt ends at the bar. In psm the prefix ends
where a piece ends, in training as in use; in spm it is split into pieces together with the middle, so a prompt that
stops inside a word shows the model a split that it has not seen. So spm needs healing (`puna.prompts.healing`), and psm
does not. On the other hand, spm's prompt only grows at its end while someone types.

Source: facebookresearch/codellama, `llama/generation.py` and `llama/tokenizer.py`; Code Llama (arXiv:2308.12950),
section 2.3.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from puna.errors import PunaError, UsageError
from puna.tokenizer import Infilling, Tokenizer

Order = Literal["psm", "spm"]

#: BOS, PRE, SUF and MID: what a prompt holds besides prefix and suffix.
MARKERS = 4

#: The share of a cut prompt that the suffix gets at least, if it is that long.
SUFFIX_SHARE = 1 / 4


def check_order(order: str) -> None:
    """Raises a `UsageError` if there is no such order of an infilling prompt."""
    if order not in get_args(Order):
        raise UsageError(f'the order of an infilling prompt is "psm" or "spm", not {order!r}')


def infill_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, *, order: Order = "psm") -> list[int]:
    """The ids that ask for what belongs between `prefix` and `suffix`.

    Raises:
        PunaError: the vocabulary has no infilling markers (Code Llama 34B and Python).
        UsageError: `order` is unknown.
    """
    check_order(order)
    markers = _markers(tokenizer)
    before, after = tokenizer.encode(prefix), tokenizer.encode(suffix, leading_space=False)
    if order == "psm":
        return [tokenizer.bos_id, markers.prefix_id, *before, markers.suffix_id, *after, markers.middle_id]
    return [tokenizer.bos_id, markers.prefix_id, markers.suffix_id, *after, markers.middle_id, *before]


def cut_around_gap(tokenizer: Tokenizer, prefix: str, suffix: str, budget: int) -> tuple[str, str]:
    """Cuts a long file to what fits a prompt: lines next to the gap, three quarters of the tokens for those before it.

    What one side does not need goes to the other. The line of the gap is kept whole, unless it alone is too long: then
    the part of it next to the gap is kept.

    Args:
        tokenizer: counts.
        prefix: the text before the gap.
        suffix: the text after it.
        budget: most tokens of `infill_prompt`, its markers included.

    Returns:
        The end of `prefix` and the beginning of `suffix`.

    Raises:
        UsageError: the budget does not even hold the markers.
    """
    room = budget - MARKERS
    if room < 0:
        raise UsageError(f"a budget of {budget} tokens does not hold an infilling prompt's {MARKERS} markers; raise it")

    def before(start: int) -> int:
        return len(tokenizer.encode(prefix[start:]))

    def behind(stop: int) -> int:
        return len(tokenizer.encode(suffix[:stop], leading_space=False))

    starts, stops = _line_starts(prefix), _line_stops(suffix)
    of_gap_before, of_gap_behind = before(starts[0]), behind(stops[0])
    if of_gap_before + of_gap_behind > room:
        starts, stops = range(len(prefix), starts[0] - 1, -1), range(stops[0] + 1)
        of_gap_before = of_gap_behind = 0
    share = min(max(int(room * SUFFIX_SHARE), of_gap_behind), room - of_gap_before)
    stop = _furthest(stops, behind, share)
    start = _furthest(starts, before, room - behind(stop))
    stop = _furthest(stops, behind, room - before(start))
    return prefix[start:], suffix[:stop]


def infill_document(tokenizer: Tokenizer, prefix: str, middle: str, suffix: str, *, order: Order) -> list[int]:
    """A whole document rearranged for training, from BOS to EOT; see `infill_prompt`."""
    eot_id = _markers(tokenizer).eot_id
    if order == "psm":
        gap = tokenizer.encode(middle, leading_space=False)
        return [*infill_prompt(tokenizer, prefix, suffix, order="psm"), *gap, eot_id]
    return [*infill_prompt(tokenizer, prefix + middle, suffix, order="spm"), eot_id]


def infill_stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end what was filled in: EOT, and EOS from models that forget it."""
    return (_markers(tokenizer).eot_id, tokenizer.eos_id)


def _markers(tokenizer: Tokenizer) -> Infilling:
    if tokenizer.infilling is None:
        raise PunaError(
            f"the vocabulary of {tokenizer.path} has no infilling markers; "
            "of the Code Llama family, 7B, 13B and 70B (base and Instruct) can infill, 34B and Python cannot"
        )
    return tokenizer.infilling


def _line_starts(text: str) -> Sequence[int]:
    """Where lines begin, the last one first."""
    return [0, *(newline.end() for newline in re.finditer("\n", text))][::-1]


def _line_stops(text: str) -> Sequence[int]:
    """Where lines end, after their newlines."""
    return [*dict.fromkeys([*(newline.end() for newline in re.finditer("\n", text)), len(text)])]


def _furthest(cuts: Sequence[int], cost: Callable[[int], int], most: int) -> int:
    """The last of `cuts` whose cost is at most `most`, as if costs grew along them; the first is known to fit.

    Steps double until one is too far, and are then halved, so that no cost far beyond is asked for: it may take long.
    """
    fits, step = 0, 1
    while fits + step < len(cuts) and cost(cuts[fits + step]) <= most:
        fits, step = fits + step, 2 * step
    too_far = min(fits + step, len(cuts))
    while too_far - fits > 1:
        middle = (fits + too_far) // 2
        fits, too_far = (middle, too_far) if cost(cuts[middle]) <= most else (fits, middle)
    return cuts[fits]
