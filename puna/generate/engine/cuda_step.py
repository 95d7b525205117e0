"""A step of the network in few kernels, for CUDA devices: six a layer where few tokens decode, instead of thirty.

    a layer      norm, q, k, v | rotate q and k, keep k and v | attend | o, add | norm, gate, up, gated | down, add

Between two kernels lie some microseconds in which no weight is read, and a layer of 7B is read in a hundred. More than
a few tokens, and what has another form (int4, biases, a matrix that ranks share), are multiplied by the modules; what
lies between is still few kernels, each of which reads and writes its numbers once. The step is tested against the
modules of `puna.model.llama`: it rounds where they do, but that a norm may divide behind the product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from puna.generate.engine.cache import PagedCache, PagedLayer
from puna.generate.engine.rotary_kernel import rotate_and_keep
from puna.model.llama import DecoderLayer, Linear, Llama, RMSNorm, gated
from puna.quantized import QuantizedLinear
from puna.quantized.few_rows import MOST_ROWS
from puna.quantized.few_rows_kernel import multiply
from puna.quantized.rows_kernel import norm_rows, round_rows


class CudaStep:
    """A model as a `puna.generate.engine.network.Network`.

    Args:
        model: on its device, with activations of 16 bits.
    """

    def __init__(self, model: Llama) -> None:
        self._model, self._layers = model.model, [_Layer.of(layer) for layer in model.model.layers]
        self._dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
        self._head = _product(model.lm_head)

    def hidden(self, ids: Tensor, positions: Tensor, cache: PagedCache, wanted: Tensor | None = None) -> Tensor:
        """As `Network`."""
        x = self._model.embed_tokens(ids).to(self._dtype)
        tables = self._model.rotary_tables(positions[None], self._model.config)
        cos, sin = (table.view(len(ids), -1) for table in tables)
        for index, layer in enumerate(self._layers):
            x = layer(x, cos, sin, cache.layer(index), wanted if index == len(self._layers) - 1 else None)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """As `Network`."""
        return self._head(hidden, norm=self._model.norm)


class _Product(Protocol):
    """One linear layer, or some over the same input, end to end."""

    def __call__(
        self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None, is_gated: bool = False
    ) -> Tensor:
        """(n, in) to (n, out of all): of the normed `x`; to a residual; or silu of the first times the second."""


@dataclass(frozen=True, eq=False)
class _Fused:
    """By one kernel, and one before where rows are rounded, or int8 codes leave the first no time for a norm.

    Beyond a few rows by the modules.
    """

    weights: Sequence[Tensor]
    scales: Sequence[Tensor]
    many: "_Separate"

    def __call__(self, x: Tensor, *, norm: RMSNorm | None = None, **behind: Any) -> Tensor:
        if len(x) > MOST_ROWS:
            return self.many(x, norm=norm, **behind)
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        if self.weights[0].dtype == torch.float8_e4m3fn:
            rounded, row_scales = round_rows(x, weight, eps)
            return multiply(rounded, self.weights, self.scales, row_scales=row_scales, dtype=x.dtype, **behind)
        if self.weights[0].dtype == torch.int8 and norm is not None:
            x, weight = norm_rows(x, norm.weight, norm.eps), None
        return multiply(x, self.weights, self.scales, norm=weight, eps=eps, **behind)


@dataclass(frozen=True, eq=False)
class _Separate:
    """By the modules."""

    modules: Sequence[nn.Module]

    def __call__(
        self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None, is_gated: bool = False
    ) -> Tensor:
        x = x if norm is None else norm_rows(x, norm.weight.to(x.dtype), norm.eps)
        found = [module(x) for module in self.modules]
        out = gated(*found) if is_gated else torch.cat(found, dim=1) if len(found) > 1 else found[0]
        return out if residual is None else residual + out


def _product(*modules: nn.Module) -> _Product:
    parts = [_parts(module) for module in modules]
    weights, scales = [part[0] for part in parts if part], [part[1] for part in parts if part and part[1] is not None]
    is_alike = len({weight.dtype for weight in weights}) == 1 and len(scales) in (0, len(weights))
    separate = _Separate(modules)
    return _Fused(weights, scales, separate) if len(weights) == len(modules) and is_alike else separate


def _parts(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight of a linear layer, in 16 bits or as codes of 8 and their scales; None: it is more, or another."""
    if type(module) is Linear and module.bias is None and module.weight.itemsize == 2:
        return module.weight, None
    return module.codes() if isinstance(module, QuantizedLinear) and module.bias is None else None


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer as products."""

    layer: DecoderLayer
    qkv: _Product
    o: _Product
    gate_up: _Product
    down: _Product

    @classmethod
    def of(cls, layer: Any) -> "_Layer":
        at, mlp = layer.self_attn, layer.mlp
        qkv, gate_up = (at.q_proj, at.k_proj, at.v_proj), (mlp.gate_proj, mlp.up_proj)
        return cls(layer, _product(*qkv), _product(at.o_proj), _product(*gate_up), _product(mlp.down_proj))

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, kept: PagedLayer, wanted: Tensor | None) -> Tensor:
        """(n, D) to (n, D), or (w, D) of wanted tokens: the others give only keys and values."""
        heads = self.qkv(x, norm=self.layer.input_layernorm).view(len(x), -1, self.layer.self_attn.head_dim)
        keys, values, slots = kept.keys.flatten(), kept.values.flatten(), kept.step.slots
        n_keys = keys.numbers.shape[1]
        n_queries = heads.shape[1] - 2 * n_keys
        pools = (keys.numbers, values.numbers) if keys.scales is None else None
        rotate_and_keep(heads, cos, sin, n_queries, pools, slots)
        if pools is None:
            keys.write(slots, heads[:, n_queries:-n_keys])
            values.write(slots, heads[:, -n_keys:])
        seen = kept.see(heads[:, :n_queries])
        if wanted is not None:
            x, seen = x[wanted], seen[wanted]
        x = self.o(seen.reshape(len(x), -1), residual=x)
        wide = self.gate_up(x, norm=self.layer.post_attention_layernorm, is_gated=True)
        return self.down(wide, residual=x)
