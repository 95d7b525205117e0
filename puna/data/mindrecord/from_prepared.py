"""Rows of a prepared folder as MindFormers' `llama_preprocess.py` makes them, for training there.

    end to end   `wiki`: all documents end to end, cut every T + 1 tokens, the rest dropped
    dialogs      `qa`: one a row, cut to or filled up to T + 1; labels are the ids of targets, -100 elsewhere

Documents of which every token is a target are of the first kind, those cut for infilling included.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from puna.data.mindrecord.file import MindRecord, Schema
from puna.data.mindrecord.writer import write_mindrecord
from puna.data.rows import IGNORE, PADDING
from puna.data.shards import Dataset
from puna.errors import PunaError, UsageError
from puna.progress import say

_IDS: Schema = {"input_ids": {"type": "int32", "shape": [-1]}}
_IDS_AND_LABELS: Schema = {**_IDS, "labels": {"type": "int32", "shape": [-1]}}


def write_prepared(folder: Path | str, path: Path | str, sequence_length: int) -> int:
    """Writes a prepared folder's documents as a MindRecord file that MindFormers trains on.

    Args:
        folder: the prepared folder.
        path: the file, replaced if it is there with rows of this length; its index goes beside it.
        sequence_length: T, MindFormers' `seq_length`; rows are one token longer.

    Returns:
        The number of rows.

    Raises:
        UsageError: `sequence_length` is below 2.
        PunaError: the folder is not prepared or holds less than a row, or the file holds rows of another length.
    """
    if sequence_length < 2:
        raise UsageError(f"sequence_length is {sequence_length}; a row needs 2 tokens at least")
    dataset, width = Dataset.open(folder), sequence_length + 1
    _check_place(Path(path), width)
    if dataset.info["targets"] < dataset.info["tokens"]:
        return write_mindrecord(Path(path), "qa", _IDS_AND_LABELS, _dialogs(dataset, width))
    rows, rest = divmod(int(dataset.starts[-1]), width)
    if not rows:
        raise PunaError(
            f"{folder} holds {rest:,} tokens, less than a row of {width:,}; choose a smaller sequence_length"
        )
    if rest:
        say(f"the last {rest:,} tokens do not fill a row and are left out")
    pieces = ({"input_ids": dataset.tokens(i * width, (i + 1) * width)} for i in range(rows))
    return write_mindrecord(Path(path), "wiki", _IDS, pieces)


def _check_place(path: Path, width: int) -> None:
    """Refuses a file with rows of another length."""
    there = len(next(MindRecord.open(path).rows(), {}).get("input_ids", ())) if path.exists() else width
    if there != width:
        raise PunaError(
            f"{path} exists already with rows of {there:,} tokens, not sequence_length + 1, which is {width:,}; "
            "choose another place or remove it first"
        )


def _dialogs(dataset: Dataset, width: int) -> Iterator[dict[str, Any]]:
    cut = 0
    for start, stop in zip(dataset.starts[:-1].tolist(), dataset.starts[1:].tolist(), strict=True):
        cut += stop - start > width
        stop = min(stop, start + width)
        ids, labels = np.full(width, PADDING, np.int32), np.full(width, IGNORE, np.int32)
        ids[: stop - start] = tokens = dataset.tokens(start, stop)
        is_target = dataset.is_target(start, stop)
        labels[: stop - start] = tokens if is_target is None else np.where(is_target, tokens, IGNORE)
        yield {"input_ids": ids, "labels": labels}
    if cut:
        say(f"{cut:,} dialogs are longer than a row and were cut")
