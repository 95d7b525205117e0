"""A gap in a text as the engine takes it: `puna infill` fills in, and `puna evaluate` scores, one and the same prompt.

prefix, suffix ──▶ lines next to the gap, as many as the budget holds ──▶ psm or spm ──▶ spm: healed ──▶ tokens
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from puna.generate.sampling import Sampling
from puna.prompts import cut_around_gap, heal, infill_prompt, infill_stops
from puna.tokenizer import Tokenizer

#: Called with what is kept of prefix and suffix, where that is not all.
OnCut = Callable[[str, str], None]


def gap_prompt(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    sampling: Sampling,
    *,
    order: Literal["psm", "spm"],
    budget: int,
    healing: bool = True,
    on_cut: OnCut | None = None,
) -> tuple[list[int], Sampling]:
    """The prompt of a gap, and how it is completed: until the model says that the gap is filled.

    Args:
        tokenizer: has the infilling markers.
        prefix: the text before the gap.
        suffix: the text behind it.
        sampling: of the completion.
        order: "psm" (prefix first) or "spm" (suffix first).
        budget: most tokens of the prompt: lines far from the gap are left out beyond it (`cut_around_gap`).
        healing: in spm order, where prefix and middle are split together, let the model split the end of `prefix` anew
            (`heal`); in psm order the prefix ends where a token ends, in training as here, and is left alone.
        on_cut: is given what the budget leaves of a longer text.

    Returns:
        Token ids, at most `budget`, and `sampling` with the ids that end what was filled in and the text that it must
        begin with.

    Raises:
        PunaError: the model cannot infill; the message says which can.
    """
    sampling = replace(sampling, stop_ids=(*sampling.stop_ids, *infill_stops(tokenizer)))
    kept = cut_around_gap(tokenizer, prefix, suffix, budget)
    if on_cut is not None and kept != (prefix, suffix):
        on_cut(*kept)
    tokens = infill_prompt(tokenizer, *kept, order=order)
    if not healing or order != "spm":
        return tokens, sampling
    tokens, begins_with = heal(tokenizer, tokens)
    return tokens, replace(sampling, begins_with=begins_with)
