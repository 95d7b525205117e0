"""What the schemes have in common: a linear layer whose weight is a few stored tensors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.quantized import kernel

#: Name -> shape and dtype.
Form = dict[str, tuple[tuple[int, ...], torch.dtype]]


class QuantizedLinear(nn.Module, ABC):
    """A linear layer that holds its weight in few bits; for inference.

    What is stored are buffers. `pack` is called once they are filled, on the device where the layer is to work; from
    then on it stays there. `forward` is fast where the device has the means, `reference` is what it is tested against.
    Where our kernel multiplies, `weight` is the only buffer after `pack` and holds the kernel's blocks.

    Attributes:
        GROUP_SIZES: neighbouring weights of a row that may share a scale, the default first; (): whole rows do.
        HEAD: the scheme that a model's head gets beside this one; None: the head stays as it is.
    """

    GROUP_SIZES: ClassVar[tuple[int, ...]] = ()
    HEAD: ClassVar[str | None] = None

    weight: Tensor
    is_in_blocks = False

    def __init__(self, in_features: int, out_features: int, bias: bool, group_size: int | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        for name, (shape, dtype) in self.form(out_features, in_features, group_size).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @staticmethod
    @abstractmethod
    def form(out_features: int, in_features: int, group_size: int | None) -> Form:
        """The tensors that hold a weight (out, in)."""

    @staticmethod
    @abstractmethod
    def quantize(weight: Tensor, group_size: int | None) -> dict[str, Tensor]:
        """These tensors for a weight (out, in), fp32; each row is quantised for itself."""

    @staticmethod
    @abstractmethod
    def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight that they hold: (out, in) fp32."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Rows times the transposed weight, where our kernel does not do it: (rows, in), contiguous, to (rows, out)."""

    def pack(self, dtype: torch.dtype | None = None) -> None:
        """Brings what is stored into the form that the device multiplies with; by default they are the same.

        Args:
            dtype: of all activations there will be; None: any. Some products know one alone.
        """

    def codes(self) -> tuple[Tensor, Tensor] | None:
        """Codes (out, in) of 8 bits and scales (out,), for kernels that take them; None: it is stored otherwise."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of `x`: bf16 or fp32."""
        if self.is_in_blocks:
            out = kernel.product(x.contiguous(), self.weight, self.out_features)
        else:
            rows = self.product(x.reshape(-1, self.in_features).contiguous())
            out = rows.view(*x.shape[:-1], self.out_features)
        bias = self.bias
        return out if bias is None else out + bias.to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """What `forward` computes, plainly and in fp32: the weight is dequantised first. Before `pack`."""
        weight = self.dequantize(dict(self.named_buffers()))
        return F.linear(x.float(), weight, None if self.bias is None else self.bias.float())

    def _keep(self, **tensors: Tensor) -> None:
        """Instead of what was stored."""
        for name in self.form(self.out_features, self.in_features, self.group_size):
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _put_in_blocks(self, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
        """Keeps the weight as our kernel reads it; arguments as for `kernel.in_blocks`."""
        self._keep(weight=kernel.in_blocks(codes, scales, zeros, bits))
        self.is_in_blocks = True
