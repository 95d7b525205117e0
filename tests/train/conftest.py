"""A small prepared folder of random documents, and recipes over it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.data.shards import shard_entry, write_shard
from puna.files import write_json


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 60 random documents over 512 ids, without a tokenizer."""
    return write_random_folder(tmp_path_factory.mktemp("prepared"), seed=0)


def write_random_folder(folder: Path, *, seed: int) -> Path:
    """Writes documents of 5 to 60 tokens that repeat themselves, so that there is something to learn."""
    random = np.random.default_rng(seed)
    path = folder / "shard-00000.arrow"
    with write_shard(path) as writer:
        for number in range(60):
            phrase = random.integers(3, 512, size=7)
            writer.add(str(number), "random", np.resize(phrase, random.integers(5, 60)).astype(np.int32))
    entry = shard_entry(path, writer)
    totals = {name: entry[name] for name in ("documents", "tokens", "targets")}
    tokenizer = {"sha256": "0" * 64, "vocab_size": 512}
    write_json(
        folder / "dataset.json",
        {"format": 1, "kind": "text", "fill": "end-to-end", "tokenizer": tokenizer, "shards": [entry], **totals},
    )
    return folder


@pytest.fixture
def recipe(prepared: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that gives a recipe's content, with the changes asked for."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "model": "tiny-64",
            "data": {"train": str(prepared), "valid": str(prepared)},
            "sequence_length": 64,
            "run_dir": str(tmp_path / "run"),
            "steps": 6,
            "batch_tokens": 256,
            "precision": "fp32",
            "optimizer": {"peak_lr": 1e-2},
            "schedule": {"warmup_steps": 2},
            "validation": {"every": 4, "rows": 4},
            "device": "cpu",
            **changes,
        }

    return make
