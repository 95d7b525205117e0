r"""What a benchmark asks of a model, and what answers: a model's engine, with a seed for every answer.

    Ask("def f(x):\n")                                  to be continued
    Ask("def f(x):\n", suffix="    return y\n")         to be filled in between
    Ask("def f(x):\n", question="Complete …")           to be answered, by a model with a chat template

A prompt that is too long for the model loses what is far from the answer; a question that is, is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from puna.errors import PunaError
from puna.evaluate.stored import is_shared

if TYPE_CHECKING:
    from puna.generate import Sampling


@dataclass(frozen=True)
class Ask:
    """One prompt.

    Attributes:
        prefix: what the answer continues.
        suffix: what follows the gap that the answer fills; None: nothing is to be filled in.
        question: what a model with a chat template is asked instead; None: the prefix.
        name: of the task, for messages.
    """

    prefix: str
    suffix: str | None = None
    question: str | None = None
    name: str = "a task"


#: Called with the number of an ask and its answer, once that is there.
OnAnswer = Callable[[int, str], None]


class Completes(Protocol):
    """Whatever gives each ask an answer; each answer has a seed of its own, so what is beside it changes nothing."""

    def __call__(self, asks: Sequence[Ask], seeds: Sequence[int], on_answer: OnAnswer) -> Any:
        """Gives every answer to `on_answer` as it comes, in any order."""


@dataclass(frozen=True)
class How:
    """How answers are chosen: a protocol's numbers."""

    temperature: float
    top_p: float
    samples: int


#: Protocol -> how. The second is that of the Code Llama paper (arXiv:2308.12950), appendix C, for pass@10 and pass@100.
PROTOCOLS = {
    "greedy": How(temperature=0.0, top_p=1.0, samples=1),
    "sample": How(temperature=0.8, top_p=0.95, samples=200),
}


#: Answers that a model writes at a time by default.
ROWS = 64


class Completer:
    """Answers by a model; of a prompt longer than its context allows, what is far from the answer is cut off.

    Args:
        model: to complete with.
        tokenizer: the model's.
        max_tokens: most tokens of an answer.
        stop: an answer that continues or fills in ends before the first of these.
        batch_rows: answers that are written at a time; where one ends, the next begins.
        how: greedy by default.
        template: a chat template's name, or a folder that ships one: questions are asked in its layout.
        order: of an infilling prompt; in spm order the end of the prefix is healed (`puna.generate.gap`).
        cache_dtype: "int8" or "fp8": keep keys and values in 8 bits; None: as the model computes them.

    Attributes:
        cut_prompts: how many prompts were cut so far.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_tokens: int,
        stop: tuple[str, ...],
        batch_rows: int,
        how: How = PROTOCOLS["greedy"],
        template: str | None = None,
        order: Literal["psm", "spm"] = "psm",
        cache_dtype: str | None = None,
    ) -> None:
        from puna.generate import Sampling, prompt_room
        from puna.prompts import chat_template

        self.model, self.tokenizer, self.batch_rows, self.order = model, tokenizer, batch_rows, order
        self.template = None if template is None else chat_template(template)
        self.sampling = Sampling(temperature=how.temperature, top_p=how.top_p, max_tokens=max_tokens, stop=stop)
        if self.template is not None:
            stops = self.template.stops(tokenizer)
            self.sampling = replace(self.sampling, stop=self.template.stop_strings, stop_ids=stops)
        self._cache_dtype = cache_dtype
        self._engine: Any = None
        self.longest_prompt = max(1, prompt_room(model, max_tokens))
        self.cut_prompts = 0

    def __call__(
        self,
        asks: Sequence[Ask],
        seeds: Sequence[int] | None = None,
        on_answer: OnAnswer | None = None,
        **changes: Any,
    ) -> list[str]:
        """The answers, in the order of the asks; each is given to `on_answer` once it is there.

        Processes that share the model call this together; the asks of the first count.

        `changes` are other fields of the sampling for these, e.g. fewer `max_tokens`.
        """
        from puna.generate import Completion, Engine
        from puna.parallel.collectives import of_first_rank

        if is_shared(self.model):  # the first process knows what is asked
            asks, seeds = of_first_rank((asks, seeds))
        if not asks:
            return []
        if self._engine is None:
            self._engine = Engine(self.model, self.tokenizer, max_rows=self.batch_rows, cache_dtype=self._cache_dtype)
        prompts = {ask: self._asked(ask) for ask in dict.fromkeys(asks)}
        asked = [prompts[ask] for ask in asks]
        tokens = [tokens for tokens, _ in asked]
        samplings = [
            replace(how, seed=seed, **changes) for (_, how), seed in zip(asked, seeds or [0] * len(asks), strict=True)
        ]

        def tell(number: int, completion: Completion) -> None:
            if on_answer is not None:
                on_answer(number, completion.text)

        return [completion.text for completion in self._engine.generate(tokens, samplings, on_completion=tell)]

    def _asked(self, ask: Ask) -> "tuple[list[int], Sampling]":
        """The prompt's tokens, and how they are completed."""
        if self.template is not None:
            return self._question(ask), self.sampling
        if ask.suffix is not None:
            return self._gap(ask.prefix, ask.suffix)
        first, *tokens = self.tokenizer.encode(ask.prefix, bos=True)
        room = self.longest_prompt - 1
        if len(tokens) > room:
            self.cut_prompts += 1
            tokens = tokens[len(tokens) - room :]
        return [first, *tokens], self.sampling

    def _question(self, ask: Ask) -> list[int]:
        question = ask.prefix if ask.question is None else ask.question
        assert self.template is not None
        tokens = self.template.encode(self.tokenizer, [{"role": "user", "content": question}]).tokens
        context = self.model.config.max_position_embeddings
        if len(tokens) >= context:
            raise PunaError(
                f"the question of {ask.name} has {len(tokens)} tokens, and the model's context is {context}; score a "
                "model with a longer one, or leave --template out: of prompts that are continued the beginning is cut"
            )
        return tokens

    def _gap(self, prefix: str, suffix: str) -> "tuple[list[int], Sampling]":
        from puna.generate import gap_prompt

        def count(*_: str) -> None:
            self.cut_prompts += 1

        return gap_prompt(
            self.tokenizer, prefix, suffix, self.sampling, order=self.order, budget=self.longest_prompt, on_cut=count
        )
