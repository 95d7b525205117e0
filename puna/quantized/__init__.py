"""Layers that hold their weights in few bits, and which layers of a model do.

A quantised model is a `Llama` whose linear layers were replaced: whatever runs the one runs the other. Each file of
`schemes/` is one way to store a weight and to multiply with it; a `Quantization` says which scheme each layer has, and
stands in `config.json` beside the weights. Norms and the embedding stay as they are: they are read by the row.

    Linear  weight (out, in) bf16   ->   int8's Linear  weight (out, in) int8, weight_scale (out, 1) bf16
"""

from dataclasses import dataclass
from typing import Any

import torch

from puna.errors import PunaError, UsageError
from puna.model.config import ModelConfig
from puna.model.llama import Linear, Llama
from puna.quantized import schemes
from puna.quantized.linear import QuantizedLinear

__all__ = ["Quantization", "QuantizedLinear", "model_without_memory", "schemes"]

#: `quant_method` in config.json of the weights that puna quantised.
METHOD = "puna"

HEAD = "lm_head"


@dataclass(frozen=True)
class Quantization:
    """Which scheme each layer of a model has.

    Attributes:
        scheme: of the layers of the decoder: a file of `schemes/`.
        group_size: neighbouring weights of a row that share a scale; None: those of a whole row do.
        head: scheme of the head; None: it is as it was.
    """

    scheme: str
    group_size: int | None
    head: str | None

    @classmethod
    def of(cls, scheme: str, group_size: int | None, config: ModelConfig) -> "Quantization":
        """The quantisation of a model by a scheme.

        Args:
            scheme: its name.
            group_size: one of the scheme's; None: its first.
            config: the model's shape.

        Raises:
            UsageError: there is no such scheme or group size, or it does not divide the rows of a weight.
        """
        layer = schemes.find(scheme)
        if layer.GROUP_SIZES:
            group_size = _checked_group_size(scheme, group_size, layer.GROUP_SIZES, config)
        elif group_size is not None:
            raise UsageError(f"{scheme} scales whole rows and takes no group size; leave out --group-size")
        return cls(scheme, group_size, None if config.tie_word_embeddings else layer.HEAD)

    @classmethod
    def from_json(cls, fields: dict[str, Any], where: str) -> "Quantization":
        """Reads `quantization_config` of a `config.json`.

        Raises:
            PunaError: the weights are in a form that puna does not read.
        """
        method = fields.get("quant_method")
        if method != METHOD:
            raise PunaError(
                f"{where}: the weights are quantised by {method!r}, which puna does not read; use the checkpoint that "
                "they were made from"
            )
        scheme, head = fields.get("scheme", ""), fields.get("head")
        quantization = cls(scheme, fields.get("group_size"), head)
        for name in (scheme, head):
            if name is not None and name not in schemes.names():
                raise PunaError(f"{where}: the weights have scheme {name!r}; there are {', '.join(schemes.names())}")
        known = schemes.find(scheme).GROUP_SIZES
        if known and quantization.group_size not in known:
            sizes = ", ".join(map(str, sorted(known)))
            raise PunaError(f"{where}: the weights have groups of {quantization.group_size}; {scheme} has {sizes}")
        return quantization

    def to_json(self) -> dict[str, Any]:
        """The content of `quantization_config`."""
        return {"quant_method": METHOD, "scheme": self.scheme, "group_size": self.group_size, "head": self.head}

    def scheme_of(self, layer: str) -> type[QuantizedLinear] | None:
        """The scheme of a layer, by the name of its module; None: it is not quantised."""
        name = self.head if layer == HEAD else self.scheme if layer.endswith("_proj") else None
        return None if name is None else schemes.find(name)

    def group_size_of(self, scheme: type[QuantizedLinear]) -> int | None:
        """The group size of a scheme, which may be the head's: None where it has none."""
        return self.group_size if scheme.GROUP_SIZES else None


def model_without_memory(config: ModelConfig, quantization: Quantization | None = None) -> Llama:
    """A model on the meta device, with quantised layers where the quantisation wants them."""
    with torch.device("meta"):
        model = Llama(config)
        for name, linear in list(model.named_modules()):
            scheme = quantization.scheme_of(name) if quantization and isinstance(linear, Linear) else None
            if quantization and scheme is not None:
                owner, _, leaf = name.rpartition(".")
                group_size = quantization.group_size_of(scheme)
                layer = scheme(linear.in_features, linear.out_features, linear.bias is not None, group_size)
                setattr(model.get_submodule(owner), leaf, layer)
    return model


def _checked_group_size(scheme: str, group_size: int | None, known: tuple[int, ...], config: ModelConfig) -> int:
    widths = {config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size}
    fitting = [size for size in known if all(width % size == 0 for width in widths)]
    if group_size is None:
        group_size = next(iter(fitting), known[0])
    if group_size not in known:
        raise UsageError(f"{scheme} has no groups of {group_size}; it has {', '.join(map(str, sorted(known)))}")
    if group_size not in fitting:
        odd = next(width for width in sorted(widths) if width % group_size)
        way_out = f"take one of {', '.join(map(str, sorted(fitting)))}" if fitting else "take int8, which has no groups"
        raise UsageError(f"groups of {group_size} do not divide rows of {odd} weights, which the model has; {way_out}")
    return group_size
