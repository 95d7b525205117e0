"""Export of checkpoints: how long against the disk itself, and how much memory.

    python benchmarks/export.py [--gb 2] [--rounds 3] [--sharded MODEL] [--dir DIR]

A run folder is made with a model of random fp32 weights (2048 wide) and both of AdamW's moments, saved by one process.
In each round the same number of bytes is written and synced plainly, the checkpoint's files of weights are copied and
synced by the system's own call, which has to read as well, and `puna export` runs, which also holds them against their
checksums. Before each the checkpoint is dropped from memory; torch's libraries are loaded already.
With `--sharded` one more round takes the weights of a preset (e.g. codellama-7b) in bf16 as four ranks save them
(tp 2 x fsdp 2), which takes three times their size of disk.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from record import arguments, record

from puna.checkpoint import export
from puna.checkpoint.huggingface import parameter_shapes
from puna.checkpoint.runs import Checkpoints
from puna.model.config import ModelConfig, preset
from puna.model.llama import Llama, init_weights
from puna.model.split import split_dim
from puna.testing import PeakAnonymousMemory

#: 2048 wide, 4 key/value heads of 32; layers are added until the size is reached.
SHAPE = ModelConfig(32000, 2048, 5632, 1, 32, 4, rope_theta=1e6, max_position_embeddings=4096)


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sharded", help="a preset to export as four ranks saved it, too")
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default: the folder for temporary files")
    args = arguments(parser)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        config = shape_of(args.gb)
        size = 4 * config.parameter_count
        make_run(Path(folder) / "run", config)
        rows = [{"layout": "one process", **measured(Path(folder), size)} for _ in range(args.rounds)]
    of_disk, of_copy = (
        statistics.median(row[name] / row["export_seconds"] for row in rows)
        for name in ("disk_seconds", "copy_seconds")
    )
    if args.sharded:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            make_sharded_run(Path(folder), args.sharded)
            layout = f"{args.sharded} in bf16 by 4 ranks (tp 2 x fsdp 2)"
            rows.append({"layout": layout, **measured(Path(folder), 2 * preset(args.sharded).parameter_count)})
    facts = {
        "weights_bytes": size,
        "share_of_a_copys_speed": round(of_copy, 3),
        "share_of_the_speed_of_writing_alone": round(of_disk, 3),
        "peak_anonymous_bytes": max(row["peak_anonymous_bytes"] for row in rows[: args.rounds]),
        "goal": {"share_of_a_copys_speed": 1.0, "peak_anonymous_bytes": 500_000_000, "of_7b": 1_000_000_000},
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
    keep(run_dir, state, config)


def make_sharded_run(place: Path, model: str) -> None:
    """Writes the weights of a preset from four processes."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=save_share, args=(rank, place, model)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


def save_share(rank: int, place: Path, model: str) -> None:
    """One rank's pieces, all views of a few random values: the whole model and its copy would not fit a small host."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, Shard

    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=4)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "fsdp"))
    config = preset(model)
    shapes = parameter_shapes(config)
    room = max(torch.Size(shape).numel() for shape in shapes.values()) // 4
    values = torch.randn(room + 1000 * len(shapes), generator=torch.Generator().manual_seed(rank)).bfloat16()
    state = {}
    for number, (name, shape) in enumerate(shapes.items()):
        dim = split_dim(name)
        local = list(shape)
        for cut in (0, dim):
            if cut is not None:
                local[cut] //= 2
        n = torch.Size(local).numel()
        placements = [Replicate() if dim is None else Shard(dim), Shard(0)]
        piece = values[1000 * number : 1000 * number + n].view(local)
        state[name] = DTensor.from_local(piece, mesh, placements, run_check=False)
    with patch("puna.checkpoint.runs._copied", lambda values, _: values):  # nothing changes them while they are written
        keep(place / "run", {"model": state}, config)
    dist.destroy_process_group()


def keep(run_dir: Path, state: dict[str, Any], config: ModelConfig) -> None:
    """Saves a checkpoint as training does."""
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, state, {"model_config": config.to_json()})
    checkpoints.wait()


def measured(place: Path, size: int) -> dict[str, Any]:
    """One round in a process of its own, whose memory is not what others left."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(one_round, place, size).result()


def one_round(place: Path, size: int) -> dict[str, Any]:
    """Plain bytes, a copy, export."""
    importlib.import_module("puna.checkpoint.sharded")  # half a second of libraries, which are not the disk's
    forget(place / "run")
    disk_seconds = write_plainly(place / "plain", size)
    forget(place / "run")
    copy_seconds = copy(next((place / "run").rglob("model")), place / "copy")
    forget(place / "run")
    started = time.perf_counter()
    with PeakAnonymousMemory() as memory:
        export(place / "run", place / "out")
    seconds = time.perf_counter() - started
    shutil.rmtree(place / "out")
    return {
        "export_seconds": round(seconds, 2),
        "copy_seconds": round(copy_seconds, 2),
        "disk_seconds": round(disk_seconds, 2),
        "peak_anonymous_bytes": memory.grown_bytes,
    }


def copy(folder: Path, target: Path) -> float:
    """Seconds that copying and syncing a folder's files takes."""
    target.mkdir()
    started = time.perf_counter()
    for path in sorted(folder.iterdir()):
        shutil.copyfile(path, target / path.name)  # sendfile, in the system
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


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
