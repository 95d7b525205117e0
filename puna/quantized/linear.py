"""What the schemes have in common: a linear layer whose weight is a few stored tensors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Name -> shape and dtype.
Form = dict[str, tuple[tuple[int, ...], torch.dtype]]


class QuantizedLinear(nn.Module, ABC):
    """A linear layer that holds its weight in few bits; for inference.

    What is stored are buffers. `pack` is called once they are filled, on the device where the layer is to work; from
    then on it stays there. `forward` is fast where the device has the means, `reference` is what it is tested against.

    Attributes:
        GROUP_SIZES: neighbouring weights of a row that may share a scale, the default first; (): whole rows do.
        HEAD: the scheme that a model's head gets beside this one; None: the head stays as it is.
    """

    GROUP_SIZES: ClassVar[tuple[int, ...]] = ()
    HEAD: ClassVar[str | None] = None

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
        """Rows times the transposed weight: (rows, in), contiguous, to (rows, out)."""

    def pack(self, dtype: torch.dtype | None = None) -> None:
        """Brings what is stored into the form that the device multiplies with; by default they are the same.

        Args:
            dtype: of all activations there will be; None: any. Some products know one alone.
        """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of `x`: bf16 or fp32."""
        rows = self.product(x.reshape(-1, self.in_features).contiguous())
        rows = rows if self.bias is None else rows + self.bias.to(x.dtype)
        return rows.view(*x.shape[:-1], self.out_features)

    def reference(self, x: Tensor) -> Tensor:
        """What `forward` computes, plainly and in fp32: the weight is dequantised first. Before `pack`."""
        weight = self.dequantize(dict(self.named_buffers()))
        return F.linear(x.float(), weight, None if self.bias is None else self.bias.float())
