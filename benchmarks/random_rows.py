"""Batches of random tokens: what they mean changes no speed."""

import numpy as np

from puna.data.loader import Batch, stack
from puna.data.rows import IGNORE, Row


def random_batch(rows: int, length: int, vocab_size: int, *, document: int | None = None) -> Batch:
    """Rows (rows, length) of documents of `document` tokens, or of one each, with a target for all but their last."""
    generator = np.random.default_rng(0)
    places = np.arange(length, dtype=np.int32)
    documents, positions = np.divmod(places, np.int32(document or length))
    ends = np.append(documents[1:] != documents[:-1], True)

    def row() -> Row:
        tokens = generator.integers(3, vocab_size, length, dtype=np.int32)
        return Row(tokens, np.where(ends, IGNORE, np.roll(tokens, -1)), documents, positions)

    return stack(row() for _ in range(rows))
