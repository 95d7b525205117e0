"""The ranks of a run: who they are, and which of them share what.

Weights are sharded over dp_shard and cp alike, so their mesh folds the two into one axis:

    pp x dp_replicate x shard (= dp_shard x cp) x tp
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from puna.errors import Stopped, UsageError
from puna.parallel.errors import said_once
from puna.parallel.hangs import explained_hangs
from puna.parallel.layout import Layout
from puna.parallel.shared_memory import SharedMemory
from puna.parallel.start import end_with_starter

#: Axes of the mesh that weights live on.
WEIGHT_AXES = ("pp", "dp_replicate", "shard", "tp")

#: How long a rank waits for the others before it gives up with an error.
TIMEOUT = timedelta(minutes=10)

#: Time for gloo's threads to free the tensors of the last collective. They need the interpreter for it, and a thread
#: that asks for it while Python ends aborts the process.
LET_GO_SECONDS = 0.2


@dataclass(frozen=True)
class Ranks:
    """Where a rank stands in a layout, and the groups that it exchanges with.

    Attributes:
        weights: the mesh of WEIGHT_AXES; None: one process, no groups.
        cp: the ranks that share the tokens of its rows; None: it holds them whole.
        tp: the ranks that share its matrices; None: it holds them whole.
        memory: of the ranks that its weights are sharded over, where they compute on one host; None: they do not.
    """

    layout: Layout
    weights: DeviceMesh | None
    cp: dist.ProcessGroup | None
    tp: dist.ProcessGroup | None
    pp_rank: int = 0
    dp_rank: int = 0
    cp_rank: int = 0
    tp_rank: int = 0
    memory: SharedMemory | None = None

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> "Ranks":
        """Makes the groups of a layout; every rank must call it."""
        if not dist.is_initialized():
            return cls(layout, None, None, None)
        _, replicate, shard, cp, tp = layout.sizes
        sizes = (layout.pp, replicate, shard * cp, tp)
        weights = init_device_mesh(device.type, sizes, mesh_dim_names=WEIGHT_AXES)
        rest, tp_rank = divmod(dist.get_rank(), tp)
        rest, cp_rank = divmod(rest, cp)
        pp_rank, dp_rank = divmod(rest, layout.dp_size)
        cp_group = None
        if cp > 1:
            rows = (layout.pp * layout.dp_size, cp, tp)
            cp_group = init_device_mesh(device.type, rows, mesh_dim_names=("rows", "cp", "tp")).get_group("cp")
        tp_group = weights.get_group("tp") if tp > 1 else None
        memory = SharedMemory.of(weights.get_group("shard")) if device.type == "cpu" and shard * cp > 1 else None
        return cls(layout, weights, cp_group, tp_group, pp_rank, dp_rank, cp_rank, tp_rank, memory)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """While open, this process is one of those that torchrun started; alone, there is nothing to open.

    After an error the group of accelerators is left to the end of the process, which aborts it: NCCL would wait here
    for ranks that do not come, and for recorded steps that the error's frames keep, and nobody would hear of the error.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_starter()  # strictly, with the thread that did: torchrun's main one
    backend = (
        "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    )
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    before = (store.add("puna/opened", 1) - 1) // size  # torchrun's store still has addresses of groups before this one
    of_its_own = dist.PrefixStore(f"puna/{before}", store)
    dist.init_process_group(backend, store=of_its_own, rank=rank, world_size=size, timeout=TIMEOUT)
    ends_together = device.type == "cpu"
    try:
        with said_once(), explained_hangs():
            yield
        ends_together = True
    except Stopped:
        ends_together = True
        raise
    finally:
        if ends_together:
            dist.destroy_process_group()
            time.sleep(LET_GO_SECONDS)


def rank_device(device: torch.device) -> torch.device:
    """The device of this rank where several ranks of a machine have one each; makes it the current one.

    Kernels of Triton, and waiting for the device, go to the current one, wherever the tensors are.
    """
    if device.type == "cpu":
        return device
    if "LOCAL_RANK" not in os.environ:
        torch.accelerator.set_device_index(device.index)
        return device
    index = int(os.environ["LOCAL_RANK"])
    started, there = int(os.environ.get("LOCAL_WORLD_SIZE", index + 1)), torch.accelerator.device_count()
    if started > there:  # even the ranks that have a device say so: one of them speaks for all
        raise UsageError(f"{started} processes were started on a machine with {there} devices; start one a device")
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world_rank() -> int:
    """Which of them this process is; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_rank() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return world_rank() == 0
