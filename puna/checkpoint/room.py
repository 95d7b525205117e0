"""Whether a model's weights fit the memory that is free, and what would help if not."""

from collections.abc import Mapping

import torch

from puna.checkpoint.tensors import StoredTensor
from puna.devices import free_memory_bytes
from puna.errors import PunaError, UsageError
from puna.model.config import ModelConfig
from puna.quantized import Quantization, model_without_memory, schemes


def check_room(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    share: float = 1.0,
) -> None:
    """Refuses to load what does not fit, before a byte of it is read.

    Args:
        config: the model's shape.
        tensors: what is to be loaded.
        dtype: that weights which are not quantised are loaded in; None: as stored.
        device: where they go.
        share: which share of the model they are, from 0 to 1.

    Raises:
        PunaError: they do not fit; the message says by how much, and which schemes of quantisation would.
    """
    needed = sum(torch.Size(one.shape).numel() * _loaded_dtype(one.dtype, dtype).itemsize for one in tensors.values())
    free = free_memory_bytes(device)
    if needed > free:
        sizes = {name: _quantized_bytes(config, name) for name in schemes.names()}
        fitting = [
            f"{name} ({size * share / 2**30:,.1f} GiB)"
            for name, size in sizes.items()
            if size is not None and size * share <= free
        ]
        raise PunaError(
            f"the weights need {needed / 2**30:,.1f} GiB, {(needed - free) / 2**30:,.1f} GiB more than {device} has "
            f"free; "
            + (f"{' or '.join(fitting)} would fit: puna quantize" if fitting else "no quantisation would help")
        )


def _loaded_dtype(stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    is_code = not stored.is_floating_point or stored.itemsize == 1
    return stored if is_code or asked is None else asked


def _quantized_bytes(config: ModelConfig, scheme: str) -> int | None:
    """Bytes of a quantised model, with bf16 for what is not quantised; None: the scheme's groups do not fit it."""
    try:
        quantization = Quantization.of(scheme, None, config)
    except UsageError:
        return None
    model = model_without_memory(config, quantization)
    return 2 * sum(x.numel() for x in model.parameters()) + sum(x.nbytes for x in model.buffers())
