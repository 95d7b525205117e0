"""Export of a 2 GB checkpoint: how long against the disk itself, and how much memory.

    python benchmarks/export.py [--gb 2] [--rounds 3] [--dir DIR]

A run folder is made with a model of random fp32 weights (2048 wide) and both of AdamW's moments. In each round the same
number of bytes is written and synced plainly, then `puna export` runs, then the plain bytes again; exporting also reads
the checkpoint, checksums and all. Before each export the checkpoint is dropped from the page cache.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from record import record

from puna.checkpoint import export, save_checkpoint
from puna.model.config import ModelConfig
from puna.model.llama import Llama, init_weights
from puna.testing import PeakAnonymousMemory

#: 2048 wide, 4 key/value heads of 32; layers are added until the size is reached.
SHAPE = ModelConfig(32000, 2048, 5632, 1, 32, 4, rope_theta=1e6, max_position_embeddings=4096)


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default: the folder for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        place = Path(folder)
        config = shape_of(args.gb)
        size = 4 * config.parameter_count
        make_run(place / "run", config)
        rows = [one_round(place, size) for _ in range(args.rounds)]
    ratio = statistics.median(row["disk_seconds"] / row["export_seconds"] for row in rows)
    facts = {
        "weights_bytes": size,
        "share_of_the_disks_speed": round(ratio, 3),
        "peak_anonymous_bytes": max(row["peak_anonymous_bytes"] for row in rows),
        "goal": {"share_of_the_disks_speed": 1.0, "peak_anonymous_bytes": 500_000_000},
        "config": config.to_json(),
    }
    record("export", rows, facts)


def shape_of(gigabytes: float) -> ModelConfig:
    """The model with about so many bytes of fp32 weights."""
    per_layer = replace(SHAPE, num_hidden_layers=2).parameter_count - SHAPE.parameter_count
    layers = 1 + round((gigabytes * 1e9 / 4 - SHAPE.parameter_count) / per_layer)
    return replace(SHAPE, num_hidden_layers=max(layers, 1))


def make_run(run_dir: Path, config: ModelConfig) -> None:
    """Writes a checkpoint as training does."""
    model = Llama(config)
    init_weights(model, seed=0)
    moments = {
        name: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for name, p in model.named_parameters()
    }
    state = {"model": model.state_dict(), "optimizer": {"state": moments}}
    save_checkpoint(run_dir, 1, state, {"model_config": config.to_json()})


def one_round(place: Path, size: int) -> dict[str, float]:
    """Plain bytes, export, plain bytes."""
    before = write_plainly(place / "plain", size)
    forget(place / "run")
    started = time.perf_counter()
    with PeakAnonymousMemory() as memory:
        export(place / "run", place / "out")
    seconds = time.perf_counter() - started
    shutil.rmtree(place / "out")
    after = write_plainly(place / "plain", size)
    return {
        "export_seconds": round(seconds, 2),
        "disk_seconds": round((before + after) / 2, 2),
        "peak_anonymous_bytes": memory.grown_bytes,
    }


def write_plainly(path: Path, size: int) -> float:
    """Seconds that writing and syncing `size` bytes takes."""
    block = os.urandom(1 << 24)
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.write(block[: size % len(block)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def forget(folder: Path) -> None:
    """Asks the system to drop the files of a folder from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
