"""Linear layers for inference on a CPU: bf16 weights in the order in which oneDNN's products read them.

    weight (out, in), row by row   ->   tiles of 64 outputs x 16 inputs, one behind the other

A product of few rows only reads weights, and reads tiles at the memory's full rate, where it crosses whole rows at half
of that. One order serves any number of rows. Neither gradients nor the weights come back out of it.
"""

import platform

import torch
from torch import Tensor, nn

from puna.devices import has_fast_bf16
from puna.model.llama import Linear, Llama


class PackedLinear(Linear):
    """A linear layer whose weight is packed; `Linear` over the same weight is its reference.

    Args:
        linear: the layer to pack, in bf16 on a CPU; it is not kept.

    Attributes:
        weight: (out, in), opaque to all but the product.
    """

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in bf16."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def pack_layers(model: Llama) -> None:
    """Packs the linear layers of a model that packing speeds up, one after the other; the others stay as they are."""
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if type(layer) is Linear and _gains(layer.weight):
                setattr(owner, name, PackedLinear(layer))


def _gains(weight: Tensor) -> bool:
    is_known = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    return is_known and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and has_fast_bf16(weight.device)
