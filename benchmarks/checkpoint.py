"""Checkpoints of two ranks: how long a save stops training, and how fast another layout loads it.

    python benchmarks/checkpoint.py [--gb 2] [--rounds 3] [--dir DIR]

Two gloo processes share the state of a model (fp32 weights 2048 wide, both of AdamW's moments), every tensor cut by
rows. In each round it is saved: `stop_seconds` is how long `Checkpoints.save` takes, `save_seconds` how long until it
is on the disk, which is what a synchronous save would take. Then it is loaded with every matrix cut by columns, so that
each rank needs a part of every piece, from a disk whose cache was dropped: once alone, and once as a run resumes, with
the checksums first. The same bytes read plainly, by both ranks at once, say what the disk can do. The ratios are
medians without the first row, whose save allocates the host memory that later ones use again.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from export import forget, shape_of
from record import arguments, record
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from puna.checkpoint.huggingface import parameter_shapes
from puna.checkpoint.runs import Checkpoints

RANKS = 2


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default: the folder for temporary files")
    args = arguments(parser)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        results = context.Queue()
        rest = (folder, args.gb, args.rounds + 1, results)
        ranks = [context.Process(target=measure, args=(rank, *rest)) for rank in range(RANKS)]
        for rank in ranks:
            rank.start()
        rows = results.get()
        for rank in ranks:
            rank.join()
    facts = {
        "state_bytes": rows[0].pop("state_bytes"),
        "ranks": RANKS,
        "stop_share_of_a_save": median_ratio(rows, "stop_seconds", "save_seconds"),
        "load_share_of_the_disks_speed": median_ratio(rows, "read_seconds", "load_seconds"),
        "resume_share_of_the_disks_speed": median_ratio(rows, "read_seconds", "resume_seconds"),
        "goal": {"stop_share_of_a_save": 0.1, "load_share_of_the_disks_speed": 0.5},
    }
    record("checkpoint", rows, facts)


def median_ratio(rows: list[dict[str, float]], above: str, below: str) -> float:
    """Of two columns; the first round is left out."""
    return round(statistics.median(row[above] / row[below] for row in rows[1:]), 3)


def measure(rank: int, folder: str, gigabytes: float, rounds: int, results: Any) -> None:
    """One rank's share of all rounds; rank 0 reports."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // RANKS))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    shapes = parameter_shapes(shape_of(gigabytes / 3))
    saved, loaded = state_of(shapes, mesh, dim=0), state_of(shapes, mesh, dim=1)
    run_dir = Path(folder) / "run"
    checkpoints = Checkpoints(run_dir, keep=1)
    rows: list[dict[str, float]] = []
    for step in range(1, rounds + 1):
        stop = seconds(lambda step=step: checkpoints.save(step, saved, {}))
        save = stop + seconds(checkpoints.wait)
        path = run_dir / "checkpoints" / f"step-{step:08d}"
        files = sorted(path.glob("*/*.distcp"))
        read = cold(run_dir, lambda files=files: read_plainly(files[rank::RANKS]))
        load = cold(run_dir, lambda path=path: checkpoints.load(path, loaded))
        resume = cold(run_dir, lambda: checkpoints.load(checkpoints.newest(), loaded))
        times = {"stop": stop, "save": save, "read": read, "load": load, "resume": resume}
        rows.append({f"{name}_seconds": round(value, 3) for name, value in times.items()})
    rows[0]["state_bytes"] = sum(file.stat().st_size for file in files)
    if rank == 0:
        results.put(rows)
    dist.destroy_process_group()


def state_of(shapes: dict[str, tuple[int, ...]], mesh: DeviceMesh, dim: int) -> dict[str, Any]:
    """Weights and moments of random values, cut along a dim; vectors are cut along their only one."""

    def tensors() -> dict[str, DTensor]:
        return {name: piece(shape, min(dim, len(shape) - 1)) for name, shape in shapes.items()}

    def piece(shape: tuple[int, ...], dim: int) -> DTensor:
        local = [size // RANKS if d == dim else size for d, size in enumerate(shape)]
        return DTensor.from_local(torch.randn(local), mesh, [Shard(dim)], run_check=False)

    return {"model": tensors(), "optimizer": {"exp_avg": tensors(), "exp_avg_sq": tensors()}}


def seconds(work: Callable[[], object]) -> float:
    """How long all ranks take, beginning together."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - started


def cold(folder: Path, work: Callable[[], object]) -> float:
    """Likewise, with the files of a folder dropped from memory before."""
    dist.barrier()
    forget(folder)
    return seconds(work)


def read_plainly(files: list[Path]) -> None:
    """Reads files once from front to back."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


if __name__ == "__main__":
    main()
