"""Whether products of few rows have a kernel on a device; asked without loading Triton, which takes a second."""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from puna.devices import takes_cuda_kernels

#: Rows from which torch's own products are left to multiply: each program of the kernel reads all rows.
MOST_ROWS = 64


def few_rows_product(n_rows: int, device: torch.device) -> Callable[..., Tensor] | None:
    """`puna.quantized.few_rows_kernel.multiply`, where it takes so many rows and Triton is there."""
    return _multiply() if n_rows <= MOST_ROWS and takes_cuda_kernels(device.type) else None


@cache
def _multiply() -> Callable[..., Tensor] | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from puna.quantized import few_rows_kernel

    return few_rows_kernel.multiply
