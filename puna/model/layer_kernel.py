"""Builds and calls `layer_kernel.c`: what a layer in bf16 computes on a CPU with AVX-512 BF16, without gradients.

oneDNN's products of few rows read weights at two thirds of the memory's rate and spend microseconds around each call;
torch's small operations cost as much again. `puna.model.llama` says the same in plain words and is the reference.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from puna.devices import cpu_bf16_units
from puna.native import build

SOURCE = Path(__file__).with_name("layer_kernel.c")
FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mprefer-vector-width=512", "-ffp-contract=off")

#: Outputs of a tile, and what its inputs are padded to a multiple of.
TILE, INPUTS = 64, 32

#: Rows that `product` takes at most; with more, oneDNN is as fast.
MOST_ROWS = 32


class Kernel:
    """The functions of the library; tensors are contiguous, in bf16 where nothing else is said."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        self._product, self._rms_norm = library.product, library.rms_norm
        self._rotate, self._swiglu, self._attend_paged = library.rotate, library.swiglu, library.attend_paged
        self._product.argtypes = [*[pointer] * 4, *[number] * 3, integer]
        self._rms_norm.argtypes = [*[pointer] * 3, *[number] * 2, ctypes.c_float, integer]
        self._rotate.argtypes = [*[pointer] * 3, *[number] * 3, integer]
        self._swiglu.argtypes = [*[pointer] * 2, number, integer]
        self._attend_paged.argtypes = [*[pointer] * 6, *[number] * 6, integer]

    def product(self, x: Tensor, bias: Tensor | None, weight_address: int, n_out: int) -> Tensor:
        """(..., in), of MOST_ROWS rows at most and `in` even, to (..., out).

        Args:
            x: the rows.
            bias: (out,), if any.
            weight_address: of the packed weight, in tiles.
            n_out: its outputs.
        """
        width = x.shape[-1]
        out = x.new_empty(*x.shape[:-1], n_out)
        places = weight_address, None if bias is None else bias.data_ptr(), x.data_ptr(), out.data_ptr()
        self._product(*places, x.numel() // width, width, n_out, torch.get_num_threads())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """(..., D) to (..., D), as `puna.model.llama.RMSNorm`."""
        width, out = x.shape[-1], torch.empty_like(x)
        places = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        self._rms_norm(*places, x.numel() // width, width, eps, torch.get_num_threads())
        return out

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `puna.model.llama.rotate`, in place: (B, T, N, H) by (B, T, 1, H) fp32."""
        heads, width = x.shape[-2:]
        places = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
        self._rotate(*places, x.numel() // (heads * width), heads, width, torch.get_num_threads())
        return x

    def swiglu_(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, in the place of `gate`."""
        self._swiglu(gate.data_ptr(), up.data_ptr(), gate.numel(), torch.get_num_threads())
        return gate

    def attend_paged(self, q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, lengths: Tensor) -> Tensor:
        """As `puna.generate.engine.paged_attention.attend_paged`; H is a multiple of 32."""
        out = torch.empty_like(q)
        places = (x.data_ptr() for x in (q, keys, values, block_tables, lengths, out))
        sizes = *q.shape, keys.shape[2], keys.shape[1], block_tables.shape[1]
        self._attend_paged(*places, *sizes, torch.get_num_threads())
        return out


@functools.cache
def kernel() -> Kernel | None:
    """The kernel; None: this machine has no use for it, or nothing to make it with."""
    library = build(SOURCE, FLAGS) if "avx512_bf16" in cpu_bf16_units() else None
    return None if library is None else Kernel(library)
