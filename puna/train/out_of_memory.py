"""A device that has no memory left ends a run with one message: in which moment, at what peak, and what would help.

torch's own error names the last few bytes that were missing, which says little of what took the others.
On a CPU there often is none, for the system kills the process without a word: what cannot fit there is refused before.
Where it is the memory of an accelerator's host, in which activations and gradients may wait, other things help.
"""

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import torch

from puna.config import Recipe
from puna.devices import device_name, free_host_bytes, free_memory_bytes, memory_bytes, memory_gib
from puna.errors import PunaError
from puna.model.config import ModelConfig
from puna.parallel.layout import Layout
from puna.parallel.mesh import world_size
from puna.train.continuing import MAY_CHANGE, RECIPE

#: What errors say that torch raises without a type of their own, where a CPU finds no memory, or a library of CUDA's.
SAID_OF_CPU = "DefaultCPUAllocator"
SAID = (SAID_OF_CPU, "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")

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
        shortage = _shortage(error)
        if shortage is None:
            raise
        of_host = device.type != "cpu" and (isinstance(shortage, MemoryError) or SAID_OF_CPU in str(shortage))
        total, own = _total_gib(device), Path(recipe.run_dir) / RECIPE
        name = shlex.quote(str(own)) if own.is_file() else "RECIPE"  # of a run that has begun
        if of_host:
            left, whole = free_host_bytes() / 2**30, memory_bytes() / 2**30
            where = f"of the host's {whole:,.1f} GiB no more than {left:,.1f} GiB are left"
        else:
            where = f"{device_name(device)} has {total:,.1f} GiB, the peak was {memory_gib(device):,.1f} GiB"
        ways = [*_ways_out(recipe, of_host=of_host), "fewer devices a host" if of_host else "more devices"]
        raise PunaError(
            f"out of memory {moment}: {where}. What takes less: {', '.join(ways)}; what fits is said by\n"
            f"puna plan {name} --devices {world_size()} --memory-gib {total:.1f}"
        ) from error


def _shortage(error: BaseException | None) -> BaseException | None:
    """The error that says that memory was missing, also where a pipeline has put one of its own around it, or None."""
    if error is None or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return error
    return error if any(said in str(error) for said in SAID) else _shortage(error.__cause__)


def _ways_out(recipe: Recipe, *, of_host: bool = False) -> list[str]:
    """The fields of a recipe that could be lower, each with its next value, or those that keep less on the host."""
    fewer_rows = [n for n in range(1, recipe.micro_batch_rows) if recipe.batch_rows % n == 0]
    rows, recompute = fewer_rows[-1] if fewer_rows else None, MORE_RECOMPUTED.get(recipe.recompute)
    is_offloaded, is_in_backward = recipe.recompute == "offload", recipe.optimizer.in_backward
    changes = {
        "micro_batch_rows": rows,
        "recompute_layers": None if recipe.recompute_layers is None else "null",
        "recompute": recompute if recipe.recompute_layers is None else None,
        "optimizer.state_bits": 8 if recipe.optimizer.state_bits == 32 else None,
        "optimizer.in_backward": None if is_in_backward else "true",
    }
    if of_host:
        changes = {
            "micro_batch_rows": rows if is_offloaded else None,
            "recompute": "block" if is_offloaded else None,
            "optimizer.in_backward": "false" if is_in_backward else None,
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
