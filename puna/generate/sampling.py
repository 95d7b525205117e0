"""From logits to the next token: one frozen value says how, two functions do it.

    logits (V,) -> bias -> penalties -> / temperature -> top-k -> top-p -> min-p -> softmax -> one uniform number -> id

This is transformers' order. Each step sees what the one before left, and min-p compares probabilities by their ratio,
so its place behind top-p changes nothing that it keeps. Temperature 0 takes the likeliest id after the penalty.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from puna.errors import PunaError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How a completion is chosen and when it ends.

    Attributes:
        temperature: divides the logits; 0: always the likeliest token.
        top_k: only the k likeliest tokens (more where the k-th is tied); 0: all.
        top_p: only the likeliest tokens that together reach this probability; at least one.
        min_p: only tokens at least this fraction as likely as the likeliest.
        repetition_penalty: positive logits of tokens in prompt or completion are divided by it, negative multiplied.
        presence_penalty: is taken from the logits of tokens that the completion holds already.
        frequency_penalty: is taken from them once for every time that it holds them.
        logit_bias: id -> what is added to its logit.
        max_tokens: most tokens of a completion; the model's context ends it too.
        stop: the completion ends before the first of these strings; where one alone is given, or None, a tuple is made.
        stop_ids: tokens that end a completion besides the tokenizer's EOS and EOT, and stay out of it.
        begins_with: bytes that the first tokens must spell, which are no part of the text: the end of the prompt, cut
            off to be split anew (`puna.prompts.heal`).
        seed: of the completion's own random numbers, so that nothing else in the batch has a say.
        ignore_eos: EOS and EOT are tokens like all others (for benchmarks); `stop_ids` still end.
        logprobs: log-probabilities to give with each token, as the model alone sees them: its own, and those of so
            many likeliest ones; None: none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    begins_with: bytes = b""
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            object.__setattr__(self, name, _several(getattr(self, name)))
        for name, (kind, is_valid, expected) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind) or not is_valid(value):
                raise UsageError(f"{name}={value!r} must be {expected}")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Sampling":
        """Makes one from keyword arguments.

        Raises:
            UsageError: there is no such setting; the message lists those there are.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise UsageError(f"no sampling setting is called {', '.join(unknown)}; there are {', '.join(known)}")
        return cls(**settings)

    def several(self, n: int) -> list["Sampling"]:
        """The same n times, with seeds one apart.

        Raises:
            UsageError: n is below 1, or above 1 where all would be the same: at temperature 0.
        """
        if n < 1:
            raise UsageError(f"n={n} must be 1 or more")
        if n > 1 and self.temperature == 0:
            raise UsageError(f"n={n} completions of a prompt are all the same at temperature 0; give it one above 0")
        return [dataclasses.replace(self, seed=self.seed + number) for number in range(n)]


#: What is added to logits, or multiplied with them, is no greater, nor is its inverse: fp32 still holds the result.
GREATEST = 1e15


def _is_usable(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= GREATEST


def _several(given: Any) -> Any:
    """A tuple of what was given: some, one text or None; anything else as it is, to be refused."""
    if given is None:
        return ()
    if isinstance(given, str):
        return (given,)
    return tuple(given) if isinstance(given, Iterable) else given


#: Setting -> its type, whether a value of it is valid, and that in words.
_RANGES: dict[str, tuple[type | tuple[type, ...], Callable[[Any], bool], str]] = {
    "temperature": ((int, float), lambda value: 0 <= value <= GREATEST, f"0 or more, and {GREATEST:.0e} at most"),
    "top_k": (int, lambda value: value >= 0, "0 (all tokens) or more"),
    "top_p": ((int, float), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": ((int, float), lambda value: 0 <= value <= 1, "between 0 and 1"),
    "repetition_penalty": (
        (int, float),
        lambda value: 1 / GREATEST <= value <= GREATEST,
        f"above 0 (1 changes nothing), from {1 / GREATEST:.0e} to {GREATEST:.0e}",
    ),
    "presence_penalty": ((int, float), _is_usable, f"a number of {GREATEST:.0e} at most"),
    "frequency_penalty": ((int, float), _is_usable, f"a number of {GREATEST:.0e} at most"),
    "logit_bias": (
        Mapping,
        lambda value: all(isinstance(id, int) and id >= 0 and _is_usable(add) for id, add in value.items()),
        f"token ids with what is added to their logits, {GREATEST:.0e} at most",
    ),
    "logprobs": ((int, NoneType), lambda value: value is None or value >= 0, "None, or how many likeliest tokens"),
    "max_tokens": (int, lambda value: value >= 1, "1 or more"),
    "stop": (tuple, lambda value: all(isinstance(text, str) and text for text in value), "texts, none of them empty"),
    "stop_ids": (tuple, lambda value: all(isinstance(id, int) and id >= 0 for id in value), "token ids"),
    "begins_with": (bytes, lambda value: True, "bytes"),
    "seed": (int, lambda value: 0 <= value < 2**63, "between 0 and 2**63 - 1"),
    "ignore_eos": (bool, lambda value: True, "True or False"),
}


def check_numbers(logits: Tensor) -> None:
    """Refuses logits of any shape that are not numbers.

    Raises:
        PunaError: one of them is NaN, or infinite where it is not below all others.
    """
    if (logits.isnan() | logits.isposinf()).any():
        raise PunaError("the model's logits are not numbers: its weights are damaged, or too large for this dtype")


def choose(
    logits: Tensor,
    is_seen: Tensor,
    sampling: Sampling,
    share: float,
    counts: Tensor | None = None,
) -> int:
    """Picks the next token.

    Args:
        logits: (V,) of one sequence, on the CPU; -inf where a token is ruled out.
        is_seen: (V,) bool, tokens of the prompt and the completion so far.
        sampling: how to pick.
        share: a uniformly distributed number of [0, 1); of no account at temperature 0.
        counts: (V,) how often the completion holds each token; None: nothing asks for it.

    """
    if sampling.temperature == 0:
        return int(_scores(logits, is_seen, sampling, counts).argmax())
    together = distribution(logits, is_seen, sampling, counts).double().cumsum(0)
    return int(torch.searchsorted(together, share * together[-1], right=True))  # never a token of probability 0


def distribution(logits: Tensor, is_seen: Tensor, sampling: Sampling, counts: Tensor | None = None) -> Tensor:
    """Probability (V,) fp32 with which each token comes next; arguments as for `choose`, temperature above 0."""
    scores = _scores(logits, is_seen, sampling, counts)
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)  # fp32 makes 0 of what is far below
    scores = (scores - scores.max()) / temperature  # 0 at most, so that no temperature overflows
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p < 1:
        scores = scores.masked_fill(_is_tail(scores.softmax(0), 1 - sampling.top_p), -math.inf)
    if sampling.min_p > 0:
        likelihoods = scores.softmax(0)
        scores = scores.masked_fill(likelihoods < sampling.min_p * likelihoods.max(), -math.inf)
    return scores.softmax(0)


def _is_tail(likelihoods: Tensor, most: float) -> Tensor:
    """Which tokens (V,) are the least likely ones that together reach no more than `most`; never the likeliest.

    Those below the V-th part of `most` are, without a look at their order: of all but a few that need not be found.
    """
    is_tail = likelihoods < most / len(likelihoods)
    others = is_tail.logical_not().nonzero().view(-1)
    ascending, order = likelihoods[others].sort(stable=True)  # of tokens alike, the first ids go, on any device
    together = ascending.cumsum(0) + likelihoods[is_tail].sum()
    is_tail[others[order[:-1][together[:-1] <= most]]] = True
    return is_tail


def _scores(logits: Tensor, is_seen: Tensor, sampling: Sampling, counts: Tensor | None) -> Tensor:
    """Logits (V,) with bias and penalties; vLLM's order."""
    if sampling.logit_bias:
        logits = logits.float().clone()
        logits[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
    scores = penalised(logits, is_seen, sampling.repetition_penalty)
    if counts is not None:
        scores = scores - counts * sampling.frequency_penalty - (counts > 0) * sampling.presence_penalty
    return scores


def penalised(logits: Tensor, is_seen: Tensor, penalty: float) -> Tensor:
    """Logits (V,) fp32 in which tokens seen before are made less likely (penalty above 1) or more.

    Source: CTRL (arXiv:1909.05858), section 4.1; the rule for negative logits is transformers' and vLLM's.
    """
    logits = logits.float()
    if penalty == 1:
        return logits
    return torch.where(is_seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
