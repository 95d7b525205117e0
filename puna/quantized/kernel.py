"""Builds and calls `kernel.c`: products of int8 and int4 weights as fast as the memory gives them, on CPUs with AVX-512
VNNI. Elsewhere, and without a C compiler, layers multiply with torch's own products.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.devices import has_int8_units
from puna.model.calls import Library, library

SOURCE = Path(__file__).with_name("kernel.c")
FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")

#: Outputs of a tile, the fewest that it may hold, inputs that the kernel takes together, and inputs whose sums fit.
TILE, LANES, INPUTS, MOST_INPUTS = 32, 16, 8, 1 << 16

#: Bytes of a block before its codes.
HEADER = 4 * TILE

#: Rows of activations up to which the kernel multiplies codes; more of them meet weights that it dequantises, so many
#: tiles at once (benchmarks/quantised_products.py).
KERNEL_ROWS = 256
TILES_AT_ONCE = 16


class Kernel:
    """The functions of the library. Blocks are what `in_blocks` makes of a weight."""

    def __init__(self, library: Library) -> None:
        self._product, self._dequantize = library["product"], library["dequantize"]

    def product(self, x: Tensor, blocks: Tensor, n_out: int) -> Tensor:
        """(..., in) bf16, contiguous, to (..., out) bf16."""
        width = x.shape[-1]
        rows, (group, bits) = x.numel() // width, _form(blocks, width)
        out = x.new_empty(*x.shape[:-1], n_out)
        digits = x.new_empty(rows * (2 * width + 8 * (width // group) + 4), dtype=torch.uint8)
        places = blocks.data_ptr(), x.data_ptr(), out.data_ptr(), digits.data_ptr()
        self._product(*places, rows, width, n_out, group, bits)
        return out

    def transposed_weight(self, blocks: Tensor, width: int) -> Tensor:
        """The weight that blocks of rows of this width hold, (in, tiles * 32) bf16."""
        out = torch.empty(width, len(blocks) * TILE, dtype=torch.bfloat16)
        self._dequantize(blocks.data_ptr(), out.data_ptr(), width, len(blocks), *_form(blocks, width))
        return out


def multiplies(n_out: int, width: int, dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether there is a kernel here, for a weight of this shape and activations of this dtype."""
    has_shape = n_out % LANES == 0 and width % LANES == 0 and width <= MOST_INPUTS
    return has_shape and dtype == torch.bfloat16 and device.type == "cpu" and kernel() is not None


def in_blocks(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """A weight in the kernel's order: (out / 32, groups, 128 + bytes of the codes) uint8; what lacks of a tile is 0.

    Args:
        codes: (out, in) uint8, below 2**bits.
        scales, zeros: (out, groups) bf16; a weight is `(code - 2**(bits - 1)) * scale + zero`.
        bits: 4 or 8.
    """
    codes, scales, zeros = (F.pad(part, (0, 0, 0, -len(part) % TILE)) for part in (codes, scales, zeros))
    by_group = codes.view(-1, TILE, scales.shape[1], codes.shape[1] // scales.shape[1] // INPUTS, 2, 4)
    first, second = by_group.permute(4, 0, 2, 3, 1, 5)  # each (tiles, groups, group / 8, 32, 4)
    together = first | second << 4 if bits == 4 else torch.stack((first, second), dim=3)
    headers = torch.stack((scales, zeros)).unflatten(1, (-1, TILE)).permute(1, 3, 0, 2).contiguous()
    return torch.cat((headers.flatten(2).view(torch.uint8), together.flatten(2)), dim=2)


def product(x: Tensor, blocks: Tensor, n_out: int) -> Tensor:
    """Rows times the transposed weight, where `multiplies`: (..., in) bf16, contiguous, to (..., out)."""
    ours = kernel()
    assert ours is not None
    width = x.shape[-1]
    if x.numel() <= KERNEL_ROWS * width:
        return ours.product(x, blocks, n_out)
    parts = [x @ ours.transposed_weight(part, width) for part in blocks.split(TILES_AT_ONCE)]
    return torch.cat(parts, dim=-1)[..., :n_out].contiguous()


@functools.cache
def kernel() -> Kernel | None:
    """The kernel; None: this machine has no use for it, or nothing to make it with."""
    found = library(SOURCE, FLAGS) if has_int8_units() else None
    return None if found is None else Kernel(found)


def _form(blocks: Tensor, width: int) -> tuple[int, int]:
    """Group size and bits."""
    _, groups, size = blocks.shape
    group = width // groups
    return group, 8 * (size - HEADER) // (TILE * group)
