"""Layouts first, ids later, so that the texts of many documents are encoded at once.

Chat templates and infilling ask a tokenizer for the ids of texts, and lay them end to end. From a `DraftTokenizer` they
get one number below zero for each text, which stands there until the ids of all texts are known:

    draft     BOS ~0 ~1 EOS                   is_target  - - x x
    texts     ~0 = 306 763    ~1 = 1532 29991
    filled    1 306 763 1532 29991 2          is_target  - - - x x x
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.prompts import Encoded
from puna.tokenizer import BulkEncoder, Tokenizer


class DraftTokenizer:
    """A tokenizer for layouts, whose ids are filled in later."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._encoder = tokenizer, BulkEncoder(tokenizer)
        self._texts: list[tuple[str, bool]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, leading_space: bool = True) -> list[int]:
        """As `Tokenizer.encode`, with one number for all ids of the text."""
        number = ~len(self._texts)
        self._texts.append((text, leading_space))
        return [self._tokenizer.bos_id] * bos + [number] + [self._tokenizer.eos_id] * eos

    def fill(self, drafts: Sequence[Encoded]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_] | None]]:
        """Tokens of each draft, and which of them are targets; these numbers are not valid any more.

        Args:
            drafts: laid out since the last call; either all with `is_target`, or all with an empty one.

        Yields:
            (length,) tokens and (length,) is_target, or None for it.
        """
        ids = self._take_ids()
        if not drafts:
            return
        alone = cache(lambda id: np.array([id], np.int32))
        pieces = [ids[~number] if number < 0 else alone(number) for draft in drafts for number in draft.tokens]
        stops = list(accumulate(map(len, pieces), initial=0))
        tokens, targets = np.concatenate(pieces), None
        if any(draft.is_target for draft in drafts):
            of_pieces = np.fromiter(chain.from_iterable(draft.is_target for draft in drafts), np.bool_)
            targets = np.repeat(of_pieces, np.diff(stops))
        for first, last in pairwise(accumulate((len(draft.tokens) for draft in drafts), initial=0)):
            place = slice(stops[first], stops[last])
            yield tokens[place], None if targets is None else targets[place]

    def _take_ids(self) -> list[NDArray[np.int32]]:
        """The ids of all texts since the last call."""
        texts, self._texts = self._texts, []
        ids: dict[int, NDArray[np.int32]] = {}
        for wanted in (True, False):
            of_kind = {i: text for i, (text, leading_space) in enumerate(texts) if leading_space is wanted}
            found = self._encoder.encode_all(list(of_kind.values()), leading_space=wanted)
            ids.update(zip(of_kind, found, strict=True))
        return [ids[i] for i in range(len(texts))]
