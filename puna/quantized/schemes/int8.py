"""int8: weights of 8 bits, one scale a row; activations as they are.

    row of W   0.5  -1.0  0.25   ->   scale 1/127, codes  64  -127  32

The scale is rounded before the codes are chosen, so that its rounding costs nothing.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.devices import has_int8_units
from puna.quantized import kernel
from puna.quantized.digits import product_by_digits
from puna.quantized.few_rows import few_rows_product
from puna.quantized.linear import Form, QuantizedLinear

#: Rows of activations up to which torch's packed product is faster than a dequantised one on a CPU without units for
#: int8: it reads the codes once for a few rows, but multiplies slowly (benchmarks/quantised_products.py).
PACKED_ROWS = 24


class Linear(QuantizedLinear):
    """Multiplies with the codes, and with the scales afterwards."""

    HEAD = "int8"

    weight_scale: Tensor
    _is_packed = False

    @staticmethod
    def form(out_features: int, in_features: int, group_size: int | None) -> Form:
        """Codes and scales."""
        return {
            "weight": ((out_features, in_features), torch.int8),
            "weight_scale": ((out_features, 1), torch.bfloat16),
        }

    @staticmethod
    def quantize(weight: Tensor, group_size: int | None) -> dict[str, Tensor]:
        """The greatest weight of a row becomes 127."""
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
        codes = torch.where(scale > 0, weight / scale.float(), 0).round().clamp(-127, 127)
        return {"weight": codes.to(torch.int8), "weight_scale": scale}

    @staticmethod
    def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
        """Codes times scales."""
        return tensors["weight"].float() * tensors["weight_scale"].float()

    def pack(self, dtype: torch.dtype | None = None) -> None:
        """Orders the codes as our kernel reads them, or oneDNN on a CPU with units for int8."""
        if kernel.multiplies(self.out_features, self.in_features, dtype, self.weight.device):
            codes = self.weight.view(torch.uint8) ^ 128
            self._put_in_blocks(codes, self.weight_scale, torch.zeros_like(self.weight_scale), bits=8)
        elif self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and has_int8_units():
            self._is_packed = True
            self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)
            self.weight_scale = self.weight_scale.float().view(-1)

    def codes(self) -> tuple[Tensor, Tensor] | None:
        """As they are stored, unless a CPU has its own order."""
        return None if self._is_packed or self.is_in_blocks else (self.weight, self.weight_scale.view(-1))

    def product(self, x: Tensor) -> Tensor:
        """(rows, in) to (rows, out)."""
        if self._is_packed:
            return product_by_digits(x, self.weight, self.weight_scale)
        if x.device.type == "cpu" and len(x) <= PACKED_ROWS:
            return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.weight_scale.to(x.dtype).view(-1))
        product: Tensor = torch.ops.puna.int8_product(x, self.weight, self.weight_scale.view(-1))
        return product


def product_reference(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(rows, in) times the transposed (out, in) codes, in the dtype of `x`, and times the (out,) scales."""
    return F.linear(x, codes.to(x.dtype)) * scales.to(x.dtype)


def _product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    if x.itemsize == 2 and (multiply := few_rows_product(len(x), x.device)) is not None:
        return multiply(x, [codes], [scales])
    return product_reference(x, codes, scales)


# One operation by name, so that a compiled model holds it as it is; `custom_op` would load torch's compiler.
_LIBRARY = torch.library.Library("puna", "FRAGMENT")
_LIBRARY.define("int8_product(Tensor x, Tensor codes, Tensor scales) -> Tensor")
_LIBRARY.impl("int8_product", _product, "CompositeExplicitAutograd")
# The number of rows by `shape`: with `len`, compiled code would be made anew for each.
_LIBRARY.impl("int8_product", lambda x, codes, _: x.new_empty(x.shape[0], codes.shape[0]), "Meta")
