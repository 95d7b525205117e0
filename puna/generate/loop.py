"""The plain loop from prompts to completions: slow, obviously right, and what faster engines are tested against.

    prompts, one batch -> prefill -> [choose a token a row -> rows that are finished leave -> decode]* -> completions

Prompts of different lengths are padded on the right. A row's slots in the cache are its positions: what padding wrote
behind the end of a shorter prompt is seen by none of its tokens, and overwritten by the next one.
"""

from collections.abc import Sequence as Several

import torch
from torch import Tensor

from puna.errors import UsageError
from puna.generate.sampling import Sampling
from puna.generate.sequence import Completion, OnCompletion, OnText, Sequence
from puna.model.cache import KVCache
from puna.model.llama import Llama
from puna.tokenizer import Tokenizer


@torch.inference_mode()
def complete(
    model: Llama,
    tokenizer: Tokenizer | None,
    prompts: Several[Several[int]],
    sampling: Sampling | Several[Sampling],
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
    sequences = [
        Sequence(index, prompt, sampling, model.config, tokenizer, on_text)
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    for start in range(0, len(sequences), batch_rows):
        _complete_batch(model, sequences[start : start + batch_rows], on_completion)
    return [sequence.completion() for sequence in sequences]


def _complete_batch(model: Llama, batch: list[Sequence], on_completion: OnCompletion | None) -> None:
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


def _prefill(model: Llama, cache: KVCache, batch: list[Sequence]) -> Tensor:
    """Logits (B, V) behind each prompt."""
    longest = max(len(sequence.tokens) for sequence in batch)
    padded = [sequence.tokens + [0] * (longest - len(sequence.tokens)) for sequence in batch]
    hidden = model.hidden(torch.tensor(padded, device=cache.keys.device), cache=cache)
    last = torch.tensor([len(sequence.tokens) - 1 for sequence in batch], device=hidden.device)
    return model.lm_head(hidden[torch.arange(len(batch), device=hidden.device), last]).float().cpu()


def _decode(model: Llama, cache: KVCache, batch: list[Sequence]) -> Tensor:
    """Logits (B, V) behind each sequence's newest token."""
    tokens = torch.tensor([[sequence.tokens[-1]] for sequence in batch], device=cache.keys.device)
    positions = torch.tensor([[len(sequence.tokens) - 1] for sequence in batch], device=cache.keys.device)
    return model(tokens, positions=positions, cache=cache)[:, 0].float().cpu()
