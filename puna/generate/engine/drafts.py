"""Guesses of what comes next, tried together in one step: those that the model would have chosen anyway are kept.

Every guess is checked against the model's own choice, made with the sequence's own random numbers from the logits that
stand behind the tokens before it. So the text is the same with and without guesses, greedy or sampled; only the steps
are fewer.
"""

from typing import TYPE_CHECKING, Protocol

from puna.errors import UsageError

if TYPE_CHECKING:
    from puna.generate.engine.scheduler import Chunk, Running

#: Tokens that must repeat, the longest match first.
LONGEST, SHORTEST = 4, 2


class Drafter(Protocol):
    """Guesses for the sequences of an engine, all that a step tries together.

    Attributes:
        first: guesses that are tried for a sequence at first; `Running.n_drafts` says how many from then on.
    """

    first: int

    def read(self, chunks: "list[Chunk]") -> None:
        """Is shown what a step computed, before the sequences have chosen."""

    def guess(self, wanted: "list[tuple[Running, int]]") -> None:
        """Puts up to so many ids that may follow a sequence's tokens into its `drafts`, which are empty.

        Its blocks have room for them.
        """

    def next_length(self, length: int, guessed: int, right: int) -> int:
        """How many to guess next time, where `right` of the `guessed` ids were, and up to `length` were wanted."""


class PromptLookup:
    """Guesses that a text goes on as it did where its last tokens stood before: edits repeat most of what they change.

    Source: prompt lookup decoding (Saxena, 2023), "n-gram speculation" in vLLM.
    """

    first, _most = 6, 24

    def read(self, chunks: "list[Chunk]") -> None:
        """Reads tokens when it guesses."""

    def guess(self, wanted: "list[tuple[Running, int]]") -> None:
        """As `Drafter`."""
        for running, most in wanted:
            running.notes = running.notes or _Text()
            running.drafts = running.notes.goes_on(running.tokens, most)

    def next_length(self, length: int, guessed: int, right: int) -> int:
        """As `Drafter`: more where all were right, fewer where most were wrong."""
        return min(self._most, 2 * length) if right == guessed else max(2, right + 1)


def check_one_source(*, lookup: bool, draft: object) -> None:
    """Raises a UsageError where guesses would come from lookup and from a draft model."""
    if lookup and draft is not None:
        raise UsageError("a step tries one set of guesses; give lookup or a draft model, not both")


class _Text:
    """Where each run of tokens of a text stood last."""

    def __init__(self) -> None:
        #: Run of tokens -> where the text went on behind its newest occurrence, the end of the text left out.
        self._seen: dict[tuple[int, ...], int] = {}
        self._read = 0

    def goes_on(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` ids that stood behind the last `tokens` before; it is asked about one text while that grows."""
        for end in range(max(self._read, SHORTEST), len(tokens)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._seen[tuple(tokens[end - length : end])] = end
        self._read = len(tokens)
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            start = self._seen.get(tuple(tokens[-length:]))
            if start is not None:
                return tokens[start : start + most]
        return []
