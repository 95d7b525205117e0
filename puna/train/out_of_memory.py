"""A device that has no memory left ends a run with one message: in which moment, at what peak, and what would help.

torch's own error names the last few bytes that were missing, which says little of what took the others.
On a CPU there often is none, for the system kills the process without a word: what cannot fit there is refused before.
"""

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import torch

from puna.config import Recipe
from puna.devices import device_name, free_host_bytes, free_memory_bytes, memory_gib
from puna.errors import PunaError
from puna.model.config import ModelConfig
from puna.parallel.layout import Layout
from puna.parallel.mesh import world_size
from puna.train.continuing import MAY_CHANGE, RECIPE

#: What errors say that torch raises without a type of their own, where a CPU or a library of CUDA's finds no memory.
SAID = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")

#: A recomputation -> the next one, which keeps less.
MORE_RECOMPUTED = {"none": "block", "selective": "block", "block": "offload"}


def check_host_memory(recipe: Recipe, config: ModelConfig, layout: Layout) -> None:
    """Refuses a run on CPUs that cannot even hold its weights, gradients and optimizer state.

    Args:
        recipe: of the run.
        config: shape of its model.
        layout: of its processes.

    Raises:
        PunaError: this machine has too little free memory for its share.
    """
    weight, state = (2 if recipe.precision == "bf16-pure" else 4), recipe.optimizer.state_bits / 8
    bytes_each = weight * (1 if recipe.optimizer.in_backward else 2) + 2 * min(weight, state)
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * layout.dp_replicate / layout.devices
    needed, free = config.parameter_count * bytes_each * share, free_host_bytes()
    if needed > free:
        raise PunaError(
            f"weights, gradients and optimizer state of {config.parameter_count / 1e9:,.1f} billion weights take "
            f"{needed / 2**30:,.1f} GiB, and of this machine's memory {free / 2**30:,.1f} GiB are free; take a smaller "
            "model, or devices that hold it (puna plan says which do)"
        )


@contextlib.contextmanager
def explained(moment: str, recipe: Recipe, device: torch.device) -> Iterator[None]:
    """While open, an error that says that memory has run out becomes one that says what to do.

    Args:
        moment: what is going on, e.g. "in step 3".
        recipe: of the run.
        device: of this rank.

    Raises:
        PunaError: memory has run out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_shortage(error):
            raise
        peak, total, own = memory_gib(device), _total_gib(device), Path(recipe.run_dir) / RECIPE
        name = shlex.quote(str(own)) if own.is_file() else "RECIPE"  # of a run that has begun
        raise PunaError(
            f"out of memory {moment}: {device_name(device)} has {total:,.1f} GiB, the peak was {peak:,.1f} GiB. "
            f"What takes less: {', '.join([*_ways_out(recipe), 'more devices'])}; what fits is said by\n"
            f"puna plan {name} --devices {world_size()} --memory-gib {total:.1f}"
        ) from error


def _is_shortage(error: BaseException | None) -> bool:
    """Whether memory is what was missing, also where a pipeline has put an error of its own around that."""
    if error is None or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return error is not None
    return any(said in str(error) for said in SAID) or _is_shortage(error.__cause__)


def _ways_out(recipe: Recipe) -> list[str]:
    """The fields of a recipe that could be lower, each with its next value."""
    fewer_rows = [n for n in range(1, recipe.micro_batch_rows) if recipe.batch_rows % n == 0]
    recompute = MORE_RECOMPUTED.get(recipe.recompute)
    changes = {
        "micro_batch_rows": fewer_rows[-1] if fewer_rows else None,
        "recompute_layers": None if recipe.recompute_layers is None else "null",
        "recompute": recompute if recipe.recompute_layers is None else None,
        "optimizer.state_bits": 8 if recipe.optimizer.state_bits == 32 else None,
        "optimizer.in_backward": None if recipe.optimizer.in_backward else "true",
    }
    return [
        f"{name}={value}" + ("" if name in MAY_CHANGE else " (in a new run)")
        for name, value in changes.items()
        if value is not None
    ]


def _total_gib(device: torch.device) -> float:
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if module is not None and hasattr(module, "mem_get_info"):
        return module.mem_get_info(device)[1] / 2**30
    return memory_gib(device) + free_memory_bytes(device) / 2**30
