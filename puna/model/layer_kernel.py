"""Builds and calls `layer_kernel.c`: what a layer in bf16 computes on a CPU with AVX-512 BF16, without gradients.

oneDNN's products of few rows read weights at two thirds of the memory's rate and spend microseconds around each call;
torch's small operations cost as much again. `puna.model.llama` says the same in plain words and is the reference.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from puna.devices import cpu_bf16_units
from puna.model.calls import Library, library

SOURCE = Path(__file__).with_name("layer_kernel.c")
FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mprefer-vector-width=512", "-ffp-contract=off")

#: Outputs of a tile, and what its inputs are padded to a multiple of.
TILE, INPUTS = 64, 32

#: Rows that `product` takes at most; with more, oneDNN is as fast.
MOST_ROWS = 32


class Kernel:
    """The functions of the library; tensors are contiguous, in bf16 where nothing else is said."""

    def __init__(self, library: Library) -> None:
        self._product, self._rms_norm, self._rotate = library["product"], library["rms_norm"], library["rotate"]
        self._swiglu, self._add = library["swiglu"], library["add"]
        self._take_rows, self._put_rows = library["take_rows"], library["put_rows"]
        self._rotary_tables, self._attend_paged = library["rotary_tables"], library["attend_paged"]

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
        bias_address = 0 if bias is None else bias.data_ptr()
        self._product(weight_address, bias_address, x.data_ptr(), out.data_ptr(), x.numel() // width, width, n_out)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
        """(..., D) to (..., D), as `puna.model.llama.RMSNorm`; `eps` () in fp32."""
        width, out = x.shape[-1], torch.empty_like(x)
        places = x.data_ptr(), weight.data_ptr(), eps.data_ptr(), out.data_ptr()
        self._rms_norm(*places, x.numel() // width, width)
        return out

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `puna.model.llama.rotate`, in place: (B, T, N, H) by (B, T, 1, H) fp32."""
        heads, width = x.shape[-2:]
        self._rotate(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), x.numel() // (heads * width), heads, width)
        return x

    def swiglu_(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, in the place of `gate`."""
        self._swiglu(gate.data_ptr(), up.data_ptr(), gate.numel())
        return gate

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of two of one shape."""
        out = torch.empty_like(x)
        self._add(x.data_ptr(), y.data_ptr(), out.data_ptr(), x.numel())
        return out

    def take_rows(self, x: Tensor, places: Tensor) -> Tensor:
        """Of x (n, D) those at places (...) int64, which are NaN where there is none: (..., D)."""
        out = x.new_empty(*places.shape, x.shape[1])
        self._take_rows(x.data_ptr(), places.data_ptr(), out.data_ptr(), len(x), places.numel(), x.shape[1])
        return out

    def put_rows(self, x: Tensor, places: Tensor, out: Tensor) -> None:
        """Writes x (n, ...) to out[places], for places (n,) int64 within `out`."""
        self._put_rows(x.data_ptr(), places.data_ptr(), out.data_ptr(), len(x), x[0].numel())

    def rotary_tables(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """As `puna.model.llama.rotary_tables`, for (B, T) int64 and (H/2,) fp64."""
        cos, sin = frequencies.new_empty(2, *positions.shape, 1, 2 * len(frequencies), dtype=torch.float32).unbind()
        places = (x.data_ptr() for x in (positions, frequencies, cos, sin))
        self._rotary_tables(*places, positions.numel(), len(frequencies))
        return cos, sin

    def attend_paged(self, q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, lengths: Tensor) -> Tensor:
        """As `puna.generate.engine.paged_attention.attend_paged`; H is a multiple of 32."""
        out = torch.empty_like(q)
        places = (x.data_ptr() for x in (q, keys, values, block_tables, lengths, out))
        self._attend_paged(*places, *q.shape, keys.shape[2], keys.shape[1], block_tables.shape[1])
        return out


@functools.cache
def kernel() -> Kernel | None:
    """The kernel; None: this machine has no use for it, or nothing to make it with."""
    found = library(SOURCE, FLAGS) if "avx512_bf16" in cpu_bf16_units() else None
    return None if found is None else Kernel(found)
