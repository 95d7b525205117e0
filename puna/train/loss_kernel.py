"""Builds and calls `loss_kernel.c`: softmax and the gradient of the head in one pass each, on CPUs with AVX-512 BF16.

Torch widens bf16 logits, finds their softmax and rounds it in passes of their own, and writes a product in bf16 before
it is added to a gradient in fp32. `puna.train.loss` says the same in its plain ways, which are the reference.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from puna.devices import cpu_bf16_units
from puna.native import build

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16")

#: The kernel takes a vocabulary that is a multiple of LANES, and a model width that is a multiple of COLUMNS.
LANES, COLUMNS = 16, 64


class LossKernel:
    """The functions of the library; matrices are dense, in bf16 where nothing else is said."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        self._softmax, self._add_product = library.softmax, library.add_product
        self._softmax.argtypes = [*[pointer] * 2, *[number] * 2, integer]
        self._add_product.argtypes = [*[pointer] * 3, *[number] * 3, integer]

    def softmax_(self, logits: Tensor) -> Tensor:
        """Turns (n, V) logits into their softmax, in place; returns the (n, 1) logarithms of its norms, in fp32."""
        log_norms = torch.empty(len(logits), 1)
        self._softmax(logits.data_ptr(), log_norms.data_ptr(), *logits.shape, torch.get_num_threads())
        return log_norms

    def add_product_(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """Adds a' b, of (T, M) and (T, N), to (M, N) fp32."""
        places = total.data_ptr(), a.data_ptr(), b.data_ptr()
        if self._add_product(*places, *a.shape, b.shape[1], torch.get_num_threads()):
            raise MemoryError("the loss found no memory for a product")


def kernel_for(hidden: Tensor, head: Tensor) -> LossKernel | None:
    """The kernel, where it takes what the head multiplies and the head; None: torch's operations do it."""
    is_bf16 = hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu"
    fits = len(head) % LANES == 0 and head.shape[1] % COLUMNS == 0
    return kernel() if is_bf16 and fits else None


@functools.cache
def kernel() -> LossKernel | None:
    """The kernel; None: this machine has no use for it, or nothing to make it with."""
    library = build(SOURCE, FLAGS) if "avx512_bf16" in cpu_bf16_units() else None
    return None if library is None else LossKernel(library)
