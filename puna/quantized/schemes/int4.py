"""int4: weights of 4 bits, a scale and a zero for each group of neighbours in a row; activations as they are.

    group of W   -1.0 … 2.0   ->   scale 0.2, zero 0.6, codes 0 … 15;   weight = (code - 8) * scale + zero

Two codes share a byte, the first of them in its upper half. Of several ranges, from the group's whole one to one that
cuts its ends, that with the least squared error is taken. A group has a zero of its own because torch's products read
one in any case, and it lowers the error.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from puna.devices import takes_cuda_kernels
from puna.quantized import kernel
from puna.quantized.linear import Form, QuantizedLinear

#: Shares of a group's range that its codes may span.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)

#: Rows of 16-bit activations up to which torch's packed product is faster on a CPU than a dequantised one: it reads the
#: codes once for a few rows, but multiplies slowly (benchmarks/quantised_products.py). In fp32 it is slower for any.
PACKED_ROWS = 128

#: Outputs whose codes torch's kernels for AVX-512 interleave, and blocks of so many that are dequantised at once: few
#: enough to stay in the cache.
BLOCK = 64
BLOCKS_AT_ONCE = 16

#: Tiles of 16 inputs that torch's CUDA kernel may read at once; the more the better.
INNER_TILES = (8, 4, 2)


class Linear(QuantizedLinear):
    """Multiplies with codes that it dequantises as it reads them.

    Attributes:
        packed: the codes in the order of torch's kernel; before `pack` they are `weight`.
        scales_and_zeros: (in / group, out, 2).
    """

    GROUP_SIZES = (64, 32, 128)
    HEAD = "int8"  # at 4 bits its error goes straight into the logits; at 8 it is lost among the layers'

    weight_scale: Tensor
    weight_zero: Tensor
    packed: Tensor
    scales_and_zeros: Tensor
    _is_interleaved = False

    @staticmethod
    def form(out_features: int, in_features: int, group_size: int | None) -> Form:
        """Codes, scales and zeros."""
        assert group_size is not None
        groups = (out_features, in_features // group_size)
        return {
            "weight": ((out_features, in_features // 2), torch.uint8),
            "weight_scale": (groups, torch.bfloat16),
            "weight_zero": (groups, torch.bfloat16),
        }

    @staticmethod
    def quantize(weight: Tensor, group_size: int | None) -> dict[str, Tensor]:
        """Of all `RANGES` the best for each group; scales and zeros are rounded before the codes are chosen."""
        assert group_size is not None
        groups = weight.unflatten(1, (-1, group_size))
        best = _fitted(groups, RANGES[0])
        for share in RANGES[1:]:
            other = _fitted(groups, share)
            is_better = other[0] < best[0]
            best = tuple(torch.where(is_better, new, old) for new, old in zip(other, best, strict=True))
        _, codes, scale, zero = best
        pairs = codes.flatten(1).to(torch.uint8).unflatten(1, (-1, 2))
        return {
            "weight": pairs[..., 0] << 4 | pairs[..., 1],
            "weight_scale": scale.squeeze(-1).bfloat16(),
            "weight_zero": zero.squeeze(-1).bfloat16(),
        }

    @staticmethod
    def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
        """(code - 8) * scale + zero."""
        scale, zero = (tensors[name].float()[..., None] for name in ("weight_scale", "weight_zero"))
        codes = _unpaired(tensors["weight"]).float().unflatten(1, (scale.shape[1], -1))
        return _values(codes, scale, zero).flatten(1)

    def pack(self, dtype: torch.dtype | None = None) -> None:
        """Orders the codes as the device's kernel reads them."""
        if kernel.multiplies(self.out_features, self.in_features, dtype, self.weight.device):
            self._put_in_blocks(_unpaired(self.weight), self.weight_scale, self.weight_zero, bits=4)
            return
        if takes_cuda_kernels(self.weight.device.type):
            tiles = next(n for n in INNER_TILES if self.in_features % (16 * n) == 0)
            packed = torch.ops.aten._convert_weight_to_int4pack(self.weight, tiles)
        elif self.out_features % BLOCK == 0 and _interleaves():
            self._is_interleaved = True
            packed = _interleaved(self.weight)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_unpaired(self.weight).int(), 1)
        scales_and_zeros = torch.stack((self.weight_scale.t(), self.weight_zero.t()), dim=-1)
        self._keep(packed=packed, scales_and_zeros=scales_and_zeros)

    def product(self, x: Tensor) -> Tensor:
        """(rows, in) to (rows, out)."""
        if takes_cuda_kernels(x.device.type):  # it knows bf16 alone
            out = torch.ops.aten._weight_int4pack_mm(x.bfloat16(), self.packed, self.group_size, self.scales_and_zeros)
            return out.to(x.dtype)
        scales_and_zeros = self.scales_and_zeros.to(x.dtype)
        if self._is_interleaved and (len(x) > PACKED_ROWS or x.dtype == torch.float32):
            return self._dequantised_product(x, scales_and_zeros)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, scales_and_zeros)

    def _dequantised_product(self, x: Tensor, scales_and_zeros: Tensor) -> Tensor:
        step = BLOCK * BLOCKS_AT_ONCE
        parts = zip(self.packed.split(step), scales_and_zeros.split(step, dim=1), strict=True)
        return torch.cat([x @ _transposed_weight(*part) for part in parts], dim=1)


def _fitted(groups: Tensor, share: float) -> tuple[Tensor, ...]:
    """For weights (out, groups, n) and codes that span a share of a range: squared error, codes, scale and zero."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) * share / 15).bfloat16().float()
    zero = ((low + high + scale) / 2).bfloat16().float()  # of the 16 codes, 8 lie below the zero and 7 above
    codes = torch.where(scale > 0, (groups - zero) / scale, 0).round().add(8).clamp(0, 15)
    error = (_values(codes, scale, zero) - groups).square().sum(-1, keepdim=True)
    return error, codes, scale, zero


def _values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes - 8) * scale + zero


def _unpaired(pairs: Tensor) -> Tensor:
    """(out, in / 2) bytes to (out, in) codes."""
    return torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(1)


def _interleaved(pairs: Tensor) -> Tensor:
    """Bytes (out, in / 2) in the order of torch's kernels for AVX-512: byte b of an input has outputs b and b + 32.

    torch's own conversion makes the same, but by way of 32 bits a code, which takes far longer.
    """
    first, second = pairs.unflatten(0, (-1, 2, BLOCK // 2)).unbind(1)
    of_even_inputs, of_odd_inputs = first >> 4 | second & 0xF0, first & 0x0F | second << 4
    by_output = torch.stack((of_even_inputs, of_odd_inputs), dim=-1).flatten(2)
    return by_output.transpose(1, 2).contiguous().view(pairs.shape)


def _transposed_weight(packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """Interleaved codes of whole blocks to the transposed weight, (in, out)."""
    n_blocks, n_groups = len(packed) // BLOCK, len(scales_and_zeros)
    pairs = packed.view(n_blocks, n_groups, -1, BLOCK // 2)
    codes = torch.cat((pairs & 15, pairs >> 4), dim=-1).to(scales_and_zeros.dtype)
    by_block = scales_and_zeros.reshape(n_groups, n_blocks, 1, BLOCK, 2).transpose(0, 1)
    scale, zero = by_block.permute(4, 0, 1, 2, 3).contiguous()
    weight = torch.addcmul(zero - 8 * scale, codes, scale)
    return weight.flatten(1, 2).transpose(0, 1).flatten(1)


@functools.cache
def _interleaves() -> bool:
    """Whether this CPU's kernels take the order that `_interleaved` makes; those without AVX-512 do not."""
    pairs = (torch.arange(BLOCK * 2) * 37 % 251).to(torch.uint8).view(BLOCK, 2)
    converted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_unpaired(pairs).int(), 1)
    return torch.equal(converted, _interleaved(pairs))
