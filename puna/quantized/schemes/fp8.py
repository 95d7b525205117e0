"""fp8: weights and activations of 8 bits with a floating point (e4m3); one scale a row of either.

The scales of the activations are found as they come. A device that multiplies such numbers reads half the bytes of bf16
and multiplies twice as fast (few rows, which only read, have `puna.quantized.few_rows_kernel`); on others the same
numbers are multiplied in the activations' dtype, which holds them exactly: slower than bf16, but with the same result.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.devices import multiplies_fp8, takes_cuda_kernels
from puna.quantized.few_rows import few_rows_product, rounding
from puna.quantized.linear import Form, QuantizedLinear

FP8 = torch.float8_e4m3fn
GREATEST = torch.finfo(FP8).max

#: Of inputs and of outputs, which a device's products of fp8 numbers take.
MULTIPLE = 16


class Linear(QuantizedLinear):
    """Multiplies fp8 numbers, and with the scales of both factors afterwards."""

    HEAD = None  # it is 1 or 2 % of a large model's bytes, and its error goes straight into the logits

    weight_scale: Tensor
    _is_native = False

    @staticmethod
    def form(out_features: int, in_features: int, group_size: int | None) -> Form:
        """Rounded weights and their scales."""
        return {"weight": ((out_features, in_features), FP8), "weight_scale": ((out_features, 1), torch.float32)}

    @staticmethod
    def quantize(weight: Tensor, group_size: int | None) -> dict[str, Tensor]:
        """The greatest weight of a row becomes the greatest number of the format."""
        rounded, scale = round_rows(weight)
        return {"weight": rounded, "weight_scale": scale}

    @staticmethod
    def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
        """Rounded weights times their scales."""
        return tensors["weight"].float() * tensors["weight_scale"]

    def pack(self, dtype: torch.dtype | None = None) -> None:
        """Asks once what the device can do; nothing is moved."""
        fits = self.in_features % MULTIPLE == 0 and self.out_features % MULTIPLE == 0
        self._is_native = fits and multiplies_fp8(self.weight.device)

    def codes(self) -> tuple[Tensor, Tensor] | None:
        """Where the device knows them."""
        return (self.weight, self.weight_scale.view(-1)) if self._is_native else None

    def product(self, x: Tensor) -> Tensor:
        """(rows, in) to (rows, out)."""
        rounded, scale = round_rows(x)
        if self._is_native:
            native: Tensor = torch.ops.puna.fp8_product(rounded, self.weight, scale, self.weight_scale)
            return native.to(x.dtype)
        out = F.linear(rounded.to(x.dtype), self.weight.to(x.dtype))
        return (out * scale * self.weight_scale.t()).to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """As for every scheme, of activations that were rounded as well."""
        rounded, scale = round_rows(x)
        return super().reference(rounded.float() * scale)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as fp8 numbers, (rows, n), and the fp32 scales, (rows, 1), to multiply them with."""
    if (kernel := rounding(x)) is not None:
        rounded, scales = kernel(x.contiguous())
        return rounded, scales[:, None]
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / GREATEST
    return (x / scale).clamp(-GREATEST, GREATEST).to(FP8), scale


def product_reference(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor) -> Tensor:
    """(rows, in) e4m3 times the transposed (out, in) e4m3, times the scales (rows, 1) and (out, 1): bf16."""
    return (F.linear(x.float(), weight.float()) * x_scales * weight_scales.t()).bfloat16()


def _product(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor) -> Tensor:
    if (multiply := few_rows_product(len(x), x.device)) is not None:
        return multiply(x, [weight], [weight_scales.view(-1)], row_scales=x_scales.view(-1))
    if takes_cuda_kernels(x.device.type):
        return torch._scaled_mm(x, weight.t(), x_scales, weight_scales.t(), out_dtype=torch.bfloat16)
    return product_reference(x, weight, x_scales, weight_scales)


# One operation by name, as int8's is, so that a compiled model leaves the choice by the number of rows to each call.
_LIBRARY = torch.library.Library("puna", "FRAGMENT")
_LIBRARY.define("fp8_product(Tensor x, Tensor weight, Tensor x_scales, Tensor weight_scales) -> Tensor")
_LIBRARY.impl("fp8_product", _product, "CompositeExplicitAutograd")
_LIBRARY.impl("fp8_product", lambda x, w, *_: x.new_empty(x.shape[0], w.shape[0], dtype=torch.bfloat16), "Meta")
