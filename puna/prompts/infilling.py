"""Infilling: what stands before and after a gap, laid out so that the model goes on with what belongs into it.

    psm    BOS PRE encode(prefix) SUF encode(suffix)* MID | encode(middle)* EOT
    spm    BOS PRE SUF encode(suffix)* MID encode(prefix  |  + middle) EOT

`*`: without the space that SentencePiece puts in front of a text. The prompt ends at the bar. In psm the prefix ends
where a piece ends, in training as in use; in spm it is split together with the middle, so a prompt that stops inside a
word shows the model a split it has not seen. On the other hand spm's prompt only grows at its end while someone types.

Source: facebookresearch/codellama, `llama/generation.py` and `llama/tokenizer.py`; Code Llama (arXiv:2308.12950),
section 2.3.
"""

from typing import Literal

from puna.errors import PunaError, UsageError
from puna.tokenizer import Infilling, Tokenizer

Order = Literal["psm", "spm"]


def infill_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, *, order: Order = "psm") -> list[int]:
    """The ids that ask for what stands between `prefix` and `suffix`.

    Raises:
        PunaError: the vocabulary has no infilling markers (Code Llama 34B and Python).
        UsageError: `order` is unknown.
    """
    markers = _markers(tokenizer)
    before, after = tokenizer.encode(prefix), tokenizer.encode(suffix, leading_space=False)
    if _is_psm(order):
        return [tokenizer.bos_id, markers.prefix_id, *before, markers.suffix_id, *after, markers.middle_id]
    return [tokenizer.bos_id, markers.prefix_id, markers.suffix_id, *after, markers.middle_id, *before]


def infill_document(tokenizer: Tokenizer, prefix: str, middle: str, suffix: str, *, order: Order) -> list[int]:
    """A whole document rearranged for training, from BOS to EOT; see `infill_prompt`."""
    eot_id = _markers(tokenizer).eot_id
    if _is_psm(order):
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


def _is_psm(order: str) -> bool:
    if order not in ("psm", "spm"):
        raise UsageError(f'the order of an infilling prompt is "psm" or "spm", not {order!r}')
    return order == "psm"
