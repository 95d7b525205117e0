"""Guesses of what comes next, tried together in one step: those that the model would have chosen anyway are kept.

Every guess is checked against the model's own choice, made with the sequence's own random numbers from the logits that
stand behind the tokens before it. So the text is the same with and without guesses, greedy or sampled; only the steps
are fewer.
"""

from typing import Protocol

#: Tokens that must repeat, the longest match first.
LONGEST, SHORTEST = 4, 2

#: Guesses a step: at first, and at most.
FIRST, MOST = 6, 24


class Drafter(Protocol):
    """Guesses for one sequence."""

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` ids that may follow `tokens`."""

    def learn(self, guessed: int, right: int) -> None:
        """Is told how many of its guesses were tried and how many were right."""


class PromptLookup:
    """Guesses that a text goes on as it did where its last tokens stood before: edits repeat most of what they change.

    Source: prompt lookup decoding (Saxena, 2023), "n-gram speculation" in vLLM.
    """

    def __init__(self) -> None:
        #: Run of tokens -> where the text went on behind its newest occurrence, the end of the text left out.
        self._seen: dict[tuple[int, ...], int] = {}
        self._read = 0
        self._length = FIRST

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """As `Drafter`."""
        for end in range(max(self._read, SHORTEST), len(tokens)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._seen[tuple(tokens[end - length : end])] = end
        self._read = len(tokens)
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            start = self._seen.get(tuple(tokens[-length:]))
            if start is not None:
                return tokens[start : start + min(most, self._length)]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """As `Drafter`: more where all were right, fewer where most were wrong."""
        if guessed:
            self._length = min(MOST, 2 * self._length) if right == guessed else max(2, right + 1)
