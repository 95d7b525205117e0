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
from puna.model.config import ModelConfig
from puna.model.layer_kernel import INPUTS, MOST_ROWS, TILE, Kernel, kernel
from puna.model.llama import DecoderLayer, Embedding, Linear, Llama, RMSNorm, gated, rotary_frequencies, rotate


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
        self._eps = torch.tensor(norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        return self._kernel.rms_norm(x.contiguous(), self.weight, self._eps)


class FusedEmbedding(Embedding):
    """A table of token vectors that a kernel reads; `Embedding` over the same weight is its reference.

    Args:
        table: whose weight, in bf16, is taken over.
        kernel: copies its rows.
    """

    def __init__(self, table: Embedding, kernel: Kernel) -> None:
        nn.Module.__init__(self)
        self.weight, self._kernel = table.weight, kernel

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids to (..., D)."""
        return self._kernel.take_rows(self.weight, ids.long().contiguous())


def pack_layers(model: Llama) -> None:
    """Packs the linear layers of a model that packing speeds up, one after the other, and fuses what lies between.

    Weights of other dtypes stay as they are, and so does all of a model that computes in another.
    """
    if model.compute_dtype not in (None, torch.bfloat16):
        return
    _replace(model, Linear, lambda linear: PackedLinear(linear) if _gains(linear.weight, linear.bias) else linear)
    if _gains(model.model.norm.weight) and (found := kernel()) is not None:
        _replace(model, RMSNorm, lambda norm: FusedNorm(norm, found) if _gains(norm.weight) else norm)
        _replace(model, Embedding, lambda table: FusedEmbedding(table, found) if _gains(table.weight) else table)
        model.model.rotary_tables = partial(_rotary_tables, found, rotary_frequencies(model.config))
        for layer in model.modules():
            if isinstance(layer, DecoderLayer):
                layer.add, layer.self_attn.rotate = partial(_add, found), partial(_rotate, found)
                layer.mlp.gated = partial(_gated, found)


def _rotary_tables(
    kernel: Kernel, frequencies: Tensor, positions: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """As `rotary_tables`, with the config's frequencies."""
    return kernel.rotary_tables(positions.long().contiguous(), frequencies)


def _add(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """As `torch.add`."""
    return kernel.add(x, y) if x.dtype == y.dtype == torch.bfloat16 else x + y


def _rotate(kernel: Kernel, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate`; what is rotated was made for it, and its memory is used."""
    return kernel.rotate_(x, cos, sin) if x.dtype == torch.bfloat16 else rotate(x, cos, sin)


def _gated(kernel: Kernel, gate: Tensor, up: Tensor) -> Tensor:
    """As `gated`, likewise in the place of `gate`."""
    return kernel.swiglu_(gate, up) if gate.dtype == torch.bfloat16 else gated(gate, up)


def _replace(model: Llama, kind: type[nn.Module], other: Callable[[Any], nn.Module]) -> None:
    for owner in list(model.modules()):
        for name, module in list(owner.named_children()):
            if type(module) is kind:
                setattr(owner, name, other(module))


def _gains(weight: Tensor, bias: Tensor | None = None) -> bool:
    is_known = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    are_bf16 = all(x.dtype == torch.bfloat16 for x in (weight, bias) if x is not None)
    return is_known and weight.device.type == "cpu" and are_bf16 and has_fast_bf16(weight.device)


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
