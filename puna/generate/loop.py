"""The plain loop from prompts to completions: slow, obviously right, and what faster engines are tested against.

    prompts, one batch -> prefill -> [choose a token a row -> rows that are finished leave -> decode]* -> completions

Prompts of different lengths are padded on the right. A row's slots in the cache are its positions: what padding wrote
behind the end of a shorter prompt is seen by none of its tokens, and overwritten by the next one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from puna.errors import PunaError, UsageError
from puna.generate.sampling import Sampling, choose
from puna.generate.text import StoppableText
from puna.model.cache import KVCache
from puna.model.llama import Llama
from puna.tokenizer import Tokenizer

#: Called with the number of a prompt and the next piece of its completion's text; the pieces add up to the text.
OnText = Callable[[int, str], None]


@dataclass
class Completion:
    """What a model wrote behind a prompt.

    Attributes:
        tokens: the ids chosen, without a stop id; where a stop string ended them, they spell more than `text`.
        text: ends before the stop string; "" without a tokenizer.
        finish: "stop" (a token or a string that ends), or "length" (`max_tokens`, or the model's context is full).
        prompt_tokens: length of the prompt.
    """

    tokens: list[int]
    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int


#: Called with the number of a prompt and its completion.
OnCompletion = Callable[[int, Completion], None]


@torch.inference_mode()
def complete(
    model: Llama,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    on_text: OnText | None = None,
    on_completion: OnCompletion | None = None,
    batch_rows: int = 16,
) -> list[Completion]:
    """Completes prompts of tokens.

    A completion depends on its prompt and its sampling, not on the other prompts (but for the rounding of sums, which
    may differ between batches of different shapes).

    Args:
        model: on any device.
        tokenizer: spells the text and knows EOS and EOT; None: ids alone, and the model's own `eos_token_id`.
        prompts: ids, BOS included where the model wants it.
        sampling: one for all prompts, or one for each.
        on_text: is given the text while it grows, in whole characters, never more than what stays.
        on_completion: is given each completion once it is finished.
        batch_rows: prompts that are completed together.

    Raises:
        PunaError: a prompt is empty, holds an id that the model does not know, or fills the model's context.
        UsageError: stop strings without a tokenizer, or not one sampling for each prompt.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != len(prompts):
        raise UsageError(f"{len(samplings)} samplings for {len(prompts)} prompts; give one for all or one for each")
    for index, prompt in enumerate(prompts):
        _check_prompt(index, prompt, model)
    sequences = [
        _Sequence(index, prompt, sampling, model, tokenizer, on_text)
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    for start in range(0, len(sequences), batch_rows):
        _complete_batch(model, sequences[start : start + batch_rows], on_completion)
    return [sequence.completion() for sequence in sequences]


def _check_prompt(index: int, prompt: Sequence[int], model: Llama) -> None:
    config = model.config
    if len(prompt) == 0:
        raise PunaError(f"prompt {index} is empty; it needs at least one token (BOS)")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        wrong = next(id for id in prompt if not 0 <= id < config.vocab_size)
        raise PunaError(f"prompt {index} holds id {wrong}, but the model's vocabulary has {config.vocab_size} ids")
    if len(prompt) >= config.max_position_embeddings:
        raise PunaError(
            f"prompt {index} has {len(prompt)} tokens and the model's context {config.max_position_embeddings}; "
            "shorten it so that there is room for a completion"
        )


def _complete_batch(model: Llama, batch: "list[_Sequence]", on_completion: "OnCompletion | None") -> None:
    dtype = model.compute_dtype or model.lm_head.weight.dtype
    capacity = max(sequence.most_tokens for sequence in batch)
    cache = KVCache(model.config, len(batch), capacity, dtype=dtype, device=model.lm_head.weight.device)
    logits = _prefill(model, cache, batch)
    while True:
        for sequence, row in zip(batch, logits, strict=True):
            sequence.take(row)
            if sequence.finish is not None and on_completion is not None:
                on_completion(sequence.index, sequence.completion())
        unfinished = [row for row, sequence in enumerate(batch) if sequence.finish is None]
        if not unfinished:
            return
        if len(unfinished) < len(batch):
            batch = [batch[row] for row in unfinished]
            cache.keep_rows(unfinished)
        logits = _decode(model, cache, batch)


def _prefill(model: Llama, cache: KVCache, batch: "list[_Sequence]") -> Tensor:
    """Logits (B, V) behind each prompt."""
    longest = max(len(sequence.tokens) for sequence in batch)
    padded = [sequence.tokens + [0] * (longest - len(sequence.tokens)) for sequence in batch]
    hidden = model.hidden(torch.tensor(padded, device=cache.keys.device), cache=cache)
    last = torch.tensor([len(sequence.tokens) - 1 for sequence in batch], device=hidden.device)
    return model.lm_head(hidden[torch.arange(len(batch), device=hidden.device), last]).float().cpu()


def _decode(model: Llama, cache: KVCache, batch: "list[_Sequence]") -> Tensor:
    """Logits (B, V) behind each sequence's newest token."""
    tokens = torch.tensor([[sequence.tokens[-1]] for sequence in batch], device=cache.keys.device)
    positions = torch.tensor([[len(sequence.tokens) - 1] for sequence in batch], device=cache.keys.device)
    return model(tokens, positions=positions, cache=cache)[:, 0].float().cpu()


class _Sequence:
    """A prompt and its completion as it grows; knows when it is finished."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        model: Llama,
        tokenizer: Tokenizer | None,
        on_text: OnText | None,
    ) -> None:
        if sampling.stop and tokenizer is None:
            raise UsageError("stop strings need a tokenizer; give stop_ids instead")
        self.index = index
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.most_tokens = min(len(prompt) + sampling.max_tokens, model.config.max_position_embeddings)
        self.finish: Literal["stop", "length"] | None = None
        self._sampling = sampling
        self._stop_ids = _stop_ids(sampling, model, tokenizer)
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._is_seen = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        self._is_seen[self.tokens] = True
        self._spelled = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._text = StoppableText(sampling.stop)
        self._on_text = on_text

    def take(self, logits: Tensor) -> None:
        """Chooses the next token by its logits (V,), and finishes if that was the last."""
        logits[self._spelled :] = -torch.inf  # rows that only pad the vocabulary
        id = choose(logits, self._is_seen, self._sampling, self._generator)
        if id in self._stop_ids:
            self._end("stop")
            return
        self.tokens.append(id)
        self._is_seen[id] = True
        if self._stream:
            self._give(self._text.push(self._stream.push(id)))
        if self._text.is_stopped:
            self._end("stop")
        elif len(self.tokens) == self.most_tokens:
            self._end("length")

    def completion(self) -> Completion:
        """The finished completion."""
        assert self.finish is not None
        return Completion(self.tokens[self.prompt_tokens :], self._text.text, self.finish, self.prompt_tokens)

    def _end(self, finish: Literal["stop", "length"]) -> None:
        if self._stream:
            self._give(self._text.push(self._stream.finish()))
            self._give(self._text.finish())
        self.finish = "stop" if self._text.is_stopped else finish

    def _give(self, text: str) -> None:
        if text and self._on_text:
            self._on_text(self.index, text)


def _stop_ids(sampling: Sampling, model: Llama, tokenizer: Tokenizer | None) -> frozenset[int]:
    if sampling.ignore_eos:
        return frozenset(sampling.stop_ids)
    ends = {*model.config.eos_token_ids, *sampling.stop_ids}
    if tokenizer is not None:
        ends.add(tokenizer.eos_id)
        if tokenizer.infilling is not None:
            ends.add(tokenizer.infilling.eot_id)
    return frozenset(id for id in ends if id is not None)
