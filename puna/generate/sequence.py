"""A prompt and its completion as it grows: which token comes next, what text it spells, and when it ends."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from puna.errors import PunaError, UsageError
from puna.generate.sampling import Sampling, check_numbers, choose
from puna.generate.text import StoppableText
from puna.model.config import ModelConfig
from puna.tokenizer import Tokenizer

#: Called with the number of a prompt and the next piece of its completion's text; the pieces add up to the text.
OnText = Callable[[int, str], None]


@dataclass
class Completion:
    """What a model wrote behind a prompt.

    Attributes:
        tokens: the ids chosen, without a stop id; where a stop string ended them, they spell more than `text`, and
            likewise where the sampling said what they begin with.
        text: ends before the stop string; "" without a tokenizer.
        finish: "stop" (a token or a string that ends), or "length" (`max_tokens`, or the model's context is full).
        prompt_tokens: length of the prompt.
        logprobs: of each token, where the sampling asks for them; else empty.
    """

    tokens: list[int]
    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    logprobs: list["Logprobs"] = field(default_factory=list)


@dataclass(frozen=True)
class Logprobs:
    """How likely the model found a token, whatever the sampling made of that.

    Attributes:
        chosen: natural logarithm of the probability of the token that was chosen.
        likeliest: id -> the same of the likeliest tokens, the likeliest first.
    """

    chosen: float
    likeliest: dict[int, float]


#: Called with the number of a prompt and its completion.
OnCompletion = Callable[[int, Completion], None]


class Sequence:
    """A prompt and what was chosen behind it.

    Args:
        index: number of the prompt, for messages and `on_text`.
        prompt: ids, BOS included where the model wants it.
        sampling: how to choose, and when to end.
        config: of the model.
        tokenizer: spells the text and knows EOS and EOT; None: ids alone, and the model's own `eos_token_id`.
        on_text: is given the text while it grows.

    Attributes:
        tokens: prompt and completion.
        most_tokens: their number at most.
        finish: why it ended; None while it grows.

    Raises:
        PunaError: the prompt is empty, holds an id that the model does not know, or fills the model's context.
        UsageError: stop strings or `begins_with` without a tokenizer; a biased id that the model does not know.
    """

    def __init__(
        self,
        index: int,
        prompt: Iterable[int],
        sampling: Sampling,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        on_text: OnText | None = None,
    ) -> None:
        if sampling.stop and tokenizer is None:
            raise UsageError("stop strings need a tokenizer; give stop_ids instead")
        if sampling.begins_with and tokenizer is None:
            raise UsageError("begins_with needs a tokenizer, which knows what tokens spell")
        self.index = index
        self.tokens = list(prompt)
        _check_prompt(index, self.tokens, config)
        self.prompt_tokens = len(self.tokens)
        self.most_tokens = min(len(self.tokens) + sampling.max_tokens, config.max_position_embeddings)
        self.finish: Literal["stop", "length"] | None = None
        #: Ids from here on only pad the vocabulary.
        self.spelled = config.vocab_size if tokenizer is None else tokenizer.vocab_size
        self.sampling, self._vocab_size = sampling, config.vocab_size
        self._stop_ids = _stop_ids(sampling, config, tokenizer)
        self._choosing: _Choosing | None = None
        self._logprobs: list[Logprobs] = []
        if sampling.logit_bias and (highest := max(sampling.logit_bias)) >= config.vocab_size:
            raise UsageError(f"logit_bias names id {highest}, but the model's vocabulary has {config.vocab_size} ids")
        self._tokenizer = tokenizer
        self._must_spell = sampling.begins_with
        self._stream = None if tokenizer is None else tokenizer.stream(skip_bytes=len(sampling.begins_with))
        self._text = StoppableText(sampling.stop)
        self._on_text = on_text

    @property
    def goes_by_logits(self) -> bool:
        """Whether what came before has no say in the next token but through the logits, nor are these asked for."""
        s = self.sampling
        changes = s.repetition_penalty != 1 or s.logit_bias or _counts(s) or s.logprobs is not None
        return not changes and not self._must_spell

    def shares(self, n: int) -> list[float]:
        """The random numbers of the next n tokens that are chosen, of [0, 1); as they are chosen these are used up."""
        return self._by.shares(n)

    def take(self, logits: Tensor) -> None:
        """Chooses the next token by its logits (V,), on the CPU, and finishes if that was the last."""
        check_numbers(logits)
        logits[self.spelled :] = -torch.inf
        by = self._by
        id = choose(self._compatible(logits), by.is_seen, self.sampling, by.shares(1)[0], by.counts)
        if self.sampling.logprobs is not None and id not in self._stop_ids:
            logprobs = logits.float().log_softmax(0)
            best = logprobs.topk(min(self.sampling.logprobs, self.spelled, len(logprobs)))
            likeliest = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            self._logprobs.append(Logprobs(logprobs[id].item(), likeliest))
        self.take_id(id)

    def take_id(self, id: int) -> None:
        """Goes on with a token that was chosen, and finishes if it was the last."""
        if id in self._stop_ids:
            self._end("stop")
            return
        self.tokens.append(id)
        if self._must_spell and self._tokenizer:
            self._must_spell = self._must_spell[len(self._tokenizer.decode_bytes([id], leading_space=False)) :]
        if self._choosing is not None:
            self._choosing.note(id)
        if self._stream:
            self._give(self._text.push(self._stream.push(id)))
        if self._text.is_stopped:
            self._end("stop")
        elif len(self.tokens) == self.most_tokens:
            self._end("length")

    def completion(self) -> Completion:
        """The finished completion."""
        assert self.finish is not None
        tokens = self.tokens[self.prompt_tokens :]
        return Completion(tokens, self._text.text, self.finish, self.prompt_tokens, list(self._logprobs))

    @property
    def _by(self) -> "_Choosing":
        if self._choosing is None:
            self._choosing = _Choosing.of(self.tokens, self.prompt_tokens, self._vocab_size, self.sampling)
        return self._choosing

    def _compatible(self, logits: Tensor) -> Tensor:
        """Logits (V,) of the tokens that go along what must be spelled; -inf for the others."""
        if not self._must_spell or self._tokenizer is None:
            return logits
        ids = self._tokenizer.ids_along(self._must_spell)
        if not ids:
            raise PunaError(f"the vocabulary cannot spell {self._must_spell!r}, which prompt {self.index} asks for")
        return torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(ids), logits[ids])

    def _end(self, finish: Literal["stop", "length"]) -> None:
        self._choosing = None
        if self._stream:
            self._give(self._text.push(self._stream.finish()))
            self._give(self._text.finish())
        self.finish = "stop" if self._text.is_stopped else finish

    def _give(self, text: str) -> None:
        if text and self._on_text:
            self._on_text(self.index, text)


@dataclass
class _Choosing:
    """What `choose` goes by; as large as the vocabulary, so there while a sequence chooses: many more wait, or ended.

    Attributes:
        generator: the sequence's own, of a number for each token.
        is_seen: (V,) bool, tokens of prompt and completion.
        counts: (V,) how often the completion holds each; None: no penalty asks.
    """

    generator: torch.Generator
    is_seen: Tensor
    counts: Tensor | None
    _ahead: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, tokens: list[int], prompt_tokens: int, vocab_size: int, sampling: Sampling) -> "_Choosing":
        """At the first token that is chosen."""
        is_seen = torch.zeros(vocab_size, dtype=torch.bool)
        is_seen[tokens] = True
        chosen = torch.tensor(tokens[prompt_tokens:], dtype=torch.long)
        counts = chosen.bincount(minlength=vocab_size).float() if _counts(sampling) else None
        return cls(torch.Generator().manual_seed(sampling.seed), is_seen, counts)

    def shares(self, n: int) -> list[float]:
        """The generator's next n numbers."""
        missing = range(n - len(self._ahead))
        self._ahead += [torch.rand((), generator=self.generator, dtype=torch.float64).item() for _ in missing]
        return self._ahead[:n]

    def note(self, id: int) -> None:
        """Of a token that was chosen."""
        del self._ahead[:1]
        self.is_seen[id] = True
        if self.counts is not None:
            self.counts[id] += 1


def _counts(sampling: Sampling) -> bool:
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def _check_prompt(index: int, prompt: list[int], config: ModelConfig) -> None:
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


def _stop_ids(sampling: Sampling, config: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    if sampling.ignore_eos:
        return frozenset(sampling.stop_ids)
    ends = {*config.eos_token_ids, *sampling.stop_ids}
    if tokenizer is not None:
        ends.add(tokenizer.eos_id)
        if tokenizer.infilling is not None:
            ends.add(tokenizer.infilling.eot_id)
    return frozenset(id for id in ends if id is not None)
