"""Layers for inference on a CPU in bf16: weights in the order in which products read them, and few operations.

    weight (out, in), row by row   ->   tiles of 64 outputs x 16 inputs, one behind the other

A product of few rows only reads weights, and reads tiles at the memory's full rate, where it crosses whole rows at half
of that. One order serves any number of rows: few are multiplied by a kernel (`puna.model.layer_kernel`), where the
machine has it, and many by oneDNN, whose order it is. Neither gradients nor the weights come back out of it.
"""

import ctypes
import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.devices import has_fast_bf16
from puna.model.attention import Documents
from puna.model.cache import LayerCache
from puna.model.layer_kernel import INPUTS, MOST_ROWS, TILE, Kernel, kernel
from puna.model.llama import DecoderLayer, Linear, Llama, RMSNorm


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
        self._few_rows: Callable[[Tensor, Tensor | None], Tensor] | None = None
        if (address := _address_of_tiles(self.weight, linear.weight)) is not None and (found := kernel()) is not None:
            self._few_rows = partial(found.product, weight_address=address, n_out=len(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in bf16."""
        if self._few_rows is not None and x.numel() <= MOST_ROWS * x.shape[-1]:
            return self._few_rows(x.contiguous(), self.bias)
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return packed


class FusedNorm(RMSNorm):
    """A norm in one pass; `RMSNorm` over the same weight is its reference.

    Args:
        norm: whose weight, in bf16, is taken over.
        kernel: computes it.
    """

    def __init__(self, norm: RMSNorm, kernel: Kernel) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps, self._kernel = norm.weight, norm.eps, kernel

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        return self._kernel.rms_norm(x.contiguous(), self.weight, self.eps)


class FusedLayer(DecoderLayer):
    """A decoder layer in few operations; `DecoderLayer` over the same modules is its reference.

    Args:
        layer: whose modules are taken over.
        kernel: computes what lies between products.
    """

    def __init__(self, layer: DecoderLayer, kernel: Kernel) -> None:
        nn.Module.__init__(self)
        for name, module in layer.named_children():
            setattr(self, name, module)
        self._kernel = kernel

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        positions: Tensor,
        documents: Documents | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if x.dtype != torch.bfloat16:
            return super().forward(x, rotation, positions, documents, cache)
        attention, mlp = self.self_attn, self.mlp
        normed = self.input_layernorm(x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (proj(normed).unflatten(-1, (-1, attention.head_dim)) for proj in projections)
        q, k = self._kernel.rotate_(q, *rotation), self._kernel.rotate_(k, *rotation)
        out = attention.attend(q, k, v, documents) if cache is None else cache.attend(q, k, v, positions)
        x = x + attention.o_proj(out.flatten(-2))
        normed = self.post_attention_layernorm(x)
        return x + mlp.down_proj(self._kernel.swiglu_(mlp.gate_proj(normed), mlp.up_proj(normed)))


def pack_layers(model: Llama) -> None:
    """Packs the linear layers of a model that packing speeds up, one after the other, and fuses what lies between."""
    _replace(model, Linear, lambda linear: PackedLinear(linear) if _gains(linear.weight) else linear)
    if _gains(model.model.norm.weight) and (found := kernel()) is not None:
        _replace(model, RMSNorm, lambda norm: FusedNorm(norm, found))
        _replace(model, DecoderLayer, lambda layer: FusedLayer(layer, found))


def _replace(model: Llama, kind: type[nn.Module], other: Callable[[Any], nn.Module]) -> None:
    for owner in list(model.modules()):
        for name, module in list(owner.named_children()):
            if type(module) is kind:
                setattr(owner, name, other(module))


def _gains(weight: Tensor) -> bool:
    is_known = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    return is_known and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and has_fast_bf16(weight.device)


def _address_of_tiles(packed: Tensor, weight: Tensor) -> int | None:
    """Where the tiles of a packed weight begin; None: it does not lie as the kernel reads it."""
    if weight.shape[1] % 2:
        return None
    address, size_bytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    ends = [in_tile(weight[begin : begin + TILE]) for begin in (0, (len(weight) - 1) // TILE * TILE)]
    if size_bytes != -(-len(weight) // TILE) * ends[0].nbytes:
        return None
    found = torch.frombuffer((ctypes.c_char * size_bytes).from_address(address), dtype=torch.int16)
    found = found.view(-1, ends[0].numel())[[0, -1]]
    return address if torch.equal(found, torch.stack(ends)) else None


def in_tile(rows: Tensor) -> Tensor:
    """Up to 64 rows of a weight in bf16, flat, as a tile: the bits of each two inputs of all outputs."""
    width = -(-rows.shape[1] // INPUTS) * INPUTS
    whole = F.pad(rows, (0, width - rows.shape[1], 0, TILE - len(rows)))
    return whole.view(TILE, -1, 2).transpose(0, 1).flatten().view(torch.int16)
