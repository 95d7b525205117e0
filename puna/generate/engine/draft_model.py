"""Guesses by a small model of the same vocabulary, e.g. 7B for 34B: what it finds likeliest, some tokens ahead.

    the text             a b c d            the sequence's, of the large model
    the draft's cache    a b c x y          from its last guess: x was wrong
    catches up           a b c d            computes d in the place of x
    guesses              a b c d | e f g    one token of the small model each; the large one checks all in one step

The guesses of a sequence are computed on their own, so this pays where few sequences run and the large model is large.
"""

import torch
from torch import Tensor

from puna.model.cache import KVCache, token_bytes
from puna.model.llama import Llama

#: Guesses a step: at first, and at most.
FIRST, MOST = 5, 16

#: Tokens that are computed at a time while it catches up.
CHUNK_TOKENS = 512

#: Tokens that its cache holds at least, and how much more than is needed when it grows.
SMALLEST_CACHE, GROWTH = 256, 2


class DraftModel:
    """Guesses for one sequence what `model` would say, greedily; as `puna.generate.engine.drafts.Drafter`.

    A text that holds an id which the model does not know, or is longer than its context, is not guessed.

    Args:
        model: the small one, on any device.
        vocab_size: ids from here on the large model never chooses; they are not guessed.
    """

    def __init__(self, model: Llama, vocab_size: int) -> None:
        self._model = model
        self._choices = min(vocab_size, model.config.vocab_size)
        self._length = FIRST
        self._cache: KVCache | None = None
        #: The ids that the cache holds, and how many of them are known to be the text's.
        self._computed: list[int] = []
        self._sure = 0

    @torch.inference_mode()
    def guess(self, tokens: list[int], most: int) -> list[int]:
        """As `Drafter`."""
        config = self._model.config
        most = min(most, self._length, config.max_position_embeddings - len(tokens))
        while self._sure < min(len(self._computed), len(tokens) - 1) and self._is_right(tokens, self._sure):
            self._sure += 1
        if most <= 0 or max(tokens[self._sure :]) >= config.vocab_size:
            return []
        guesses = [self._likeliest(torch.tensor(tokens[self._sure :]), self._sure)]
        for position in range(len(tokens), len(tokens) + most - 1):
            guesses.append(self._likeliest(guesses[-1], position))
        ids: list[int] = torch.cat(guesses).tolist()
        self._computed = tokens + ids[:-1]
        return ids

    def learn(self, guessed: int, right: int) -> None:
        """As `Drafter`: two more where all were right, one fewer otherwise.

        Source: the heuristic schedule of transformers' assisted generation.
        """
        if guessed:
            self._length = min(MOST, self._length + 2) if right == guessed else max(1, self._length - 1)

    def _is_right(self, tokens: list[int], place: int) -> bool:
        return tokens[place] == self._computed[place]

    def _likeliest(self, tokens: Tensor, start: int) -> Tensor:
        """The id (1,) behind `tokens`, which stand at `start` and on; their keys and values are kept."""
        cache, device = self._room_for(start + len(tokens)), self._model.lm_head.weight.device
        positions = torch.arange(start, start + len(tokens), device=device)
        for chunk, places in zip(tokens.to(device).split(CHUNK_TOKENS), positions.split(CHUNK_TOKENS), strict=True):
            hidden = self._model.hidden(chunk[None], positions=places[None], cache=cache)
        return self._model.lm_head(hidden[:, -1])[:, : self._choices].argmax(-1)

    def _room_for(self, n_tokens: int) -> KVCache:
        """The cache, in a larger one where it is too small."""
        old, config = self._cache, self._model.config
        if old is None or old.capacity < n_tokens:
            capacity = min(config.max_position_embeddings, max(GROWTH * n_tokens, SMALLEST_CACHE))
            device = self._model.lm_head.weight.device
            self._cache = new = KVCache(config, 1, capacity, dtype=_dtype(self._model), device=device)
            if old is not None:
                new.keys[:, :, : old.used], new.values[:, :, : old.used] = (
                    kept[:, :, : old.used] for kept in (old.keys, old.values)
                )
                new.used = old.used
            return new
        return old


def draft_token_bytes(model: Llama) -> int:
    """Bytes that a draft model's cache takes for each token of a text that fills it, room to grow included."""
    return GROWTH * token_bytes(model.config, _dtype(model))


def _dtype(model: Llama) -> torch.dtype:
    return model.compute_dtype or model.lm_head.weight.dtype
