"""Which of this package's Triton kernels serve a device; asked without loading Triton, which takes a second."""

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from puna.devices import has_triton, multiplies_fp8, takes_cuda_kernels

#: Rows from which torch's own products are left to multiply: each program of the kernel reads all rows.
MOST_ROWS = 64


def few_rows_product(n_rows: int, device: torch.device) -> Callable[..., Tensor] | None:
    """`puna.quantized.few_rows_kernel.multiply`, where it takes so many rows and Triton is there."""
    found = _module("few_rows_kernel") if n_rows <= MOST_ROWS and takes_cuda_kernels(device.type) else None
    return None if found is None else found.multiply


def rounding(x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """`puna.quantized.rows_kernel.round_rows`, where it takes `x` and Triton is there; the compiler makes its own."""
    is_taken = x.dim() == 2 and x.itemsize == 2 and not torch.compiler.is_compiling()
    found = _module("rows_kernel") if is_taken and multiplies_fp8(x.device) else None
    return None if found is None else found.round_rows


@cache
def _module(name: str) -> ModuleType | None:
    return importlib.import_module(f"puna.quantized.{name}") if has_triton() else None
