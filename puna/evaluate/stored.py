"""A model that is loaded once all else is known to be right: a wrong file is said before a large model is read.

Processes that were started together share it, each with a part of every matrix, and all go through a benchmark
together. The first of them judges, writes and speaks; the others are its helpers.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import PunaError, UsageError

#: Files of a model that its answers depend on.
OF_A_MODEL = ("*.safetensors", "*.bin", "config.json", "tokenizer*")


@dataclass(frozen=True)
class Stored:
    """A model by its folder or hub id, and the dtype and device that it, or this process's share, is loaded with."""

    name: str
    dtype: Any = None
    device: Any = "cpu"

    @property
    def named(self) -> dict[str, str]:
        """As a result names it: "model", and "weights", which tell its files from others; a hub id has none here."""
        from puna.files import mark_of

        weights = mark_of(file for kind in OF_A_MODEL for file in Path(self.name).glob(kind))
        return {"model": self.name} | ({} if weights is None else {"weights": weights})

    def check(self) -> None:
        """Says at once what loading would say; of a hub id, which is not here yet, nothing.

        Raises:
            PunaError: a file is missing, damaged or not what it should be.
        """
        from puna.checkpoint import is_hub_id
        from puna.checkpoint.huggingface import load_quantized_config
        from puna.checkpoint.weights import open_weights
        from puna.tokenizer import load_tokenizer

        if not is_hub_id(self.name):
            load_quantized_config(self.name)
            load_tokenizer(self.name)
            open_weights(self.name)

    def __post_init__(self) -> None:
        from puna.checkpoint import is_hub_id, resolve

        if not is_hub_id(self.name):  # whose download may take an hour
            resolve(self.name)


def loaded(model: Any, tokenizer: Any, *, context: int | None = None) -> tuple[Any, Any]:
    """Model and tokenizer: those of a `Stored` one, which is loaded now, or the ones given.

    Args:
        model: a `Stored` one, or one in memory.
        tokenizer: the model's; None: its folder's.
        context: tokens that a `Stored` one may see; None: those of its config.json.

    Raises:
        PunaError: it cannot be loaded.
        UsageError: there is no tokenizer.
    """
    name = "the model"
    if isinstance(model, Stored):
        from puna.checkpoint import load
        from puna.parallel.inference import Share

        name = model.name
        place = {"device": model.device, "share": Share if is_shared(model) else None}
        model, its_own = load(model.name, dtype=model.dtype, for_inference=True, context=context, **place)
        tokenizer = tokenizer or its_own
    if tokenizer is None:
        raise UsageError(
            f"{name} has no tokenizer; copy its tokenizer.model or tokenizer.json into its folder, "
            "or give tokenizer=puna.load_tokenizer(folder)"
        )
    return model, tokenizer


def computed_in(model: Any) -> str:
    """The dtype that a model computes in, as --dtype spells it."""
    from puna.checkpoint.tensors import DTYPES

    dtype = model.compute_dtype or model.lm_head.weight.dtype
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def is_shared(model: Any) -> bool:
    """Whether processes hold a model together, or will once it is loaded; all of them go through a benchmark then.

    Raises:
        UsageError: several processes were started, and each would load the whole of it.
    """
    if isinstance(model, Stored):
        import torch.distributed as dist

        from puna.parallel.mesh import world_size

        if world_size() > 1 and not dist.is_initialized():
            raise UsageError(
                f"{world_size()} processes were started together; join them first, once: "
                "torch.distributed.init_process_group()"
            )
        return dist.is_initialized()
    if not hasattr(model, "lm_head"):  # none, or a server's
        return False
    from puna.parallel.inference import group_of

    return group_of(model) is not None


def is_helper(model: Any) -> bool:
    """Whether this process only computes with the others, and leaves the rest to the first."""
    if not is_shared(model):
        return False
    from puna.parallel.mesh import is_first_rank

    return not is_first_rank()


@contextlib.contextmanager
def agreed(model: Any) -> Iterator[None]:
    """What the first of the processes that share a model does alone, here: an error that it meets is an error of all.

    The others pass through the block, and wait at its end. Without them it does nothing.

    Raises:
        PunaError, OSError: that of the first, on all.
    """
    if not is_shared(model):
        yield
        return
    from puna.parallel.collectives import of_first_rank

    error: Exception | None = None
    try:
        yield
    except (PunaError, OSError) as met:
        error = met
    if (said := of_first_rank(error)) is not None:
        raise error or said
