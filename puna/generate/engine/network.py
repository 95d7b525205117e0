"""How a model computes a step's tokens, end to end: by its modules, compiled or not, or as few kernels."""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from puna.devices import has_triton, takes_cuda_kernels
from puna.generate.engine.cache import PagedCache, PagedLayer
from puna.model.llama import Llama

#: Of the compiler: kernels of its own for products of one row, which read weights at 74 to 103 % of the rate of a large
#: copy on an H200, where cuBLAS reads them at 63 to 91 %.
OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}


class Network(Protocol):
    """A model that is given the tokens of `cache.step`, whose keys and values it keeps."""

    def hidden(self, ids: Tensor, positions: Tensor, cache: PagedCache, wanted: Tensor | None = None) -> Tensor:
        """(n,) tokens at (n,) positions to what the head takes, (n, D); of those at the wanted places (w,), (w, D)."""

    def head(self, hidden: Tensor) -> Tensor:
        """(n, D) to logits (n, V)."""


def network_of(model: Llama, cache: PagedCache, *, is_compiled: bool) -> Network:
    """The fastest one that there is for a model.

    Args:
        model: on its device.
        cache: the one that will be given.
        is_compiled: on a CUDA device, compile the layers: a minute when they are first used, and again as they first
            see more than one token.
    """
    if not takes_cuda_kernels(cache.device.type):
        return ByModules(model)
    if is_compiled:
        cache.layer_type = _outside_compiled_layers()
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, options=OPTIONS)
        return ByModules(model, is_compiled=True)
    dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
    if dtype.itemsize > 2 or not has_triton():
        return ByModules(model)
    from puna.generate.engine.cuda_step import CudaStep

    return CudaStep(model)


@dataclass(frozen=True, eq=False)
class ByModules:
    """The modules of `puna.model.llama` one after the other: on CUDA devices, what others are tested against."""

    model: Llama
    is_compiled: bool = False

    def hidden(self, ids: Tensor, positions: Tensor, cache: PagedCache, wanted: Tensor | None = None) -> Tensor:
        """As `Network`."""
        spared = None if self.is_compiled else wanted  # the last layer would be compiled once more
        hidden = self.model.hidden(ids[None], positions=positions[None], cache=cache, wanted=spared)[0]
        return hidden if wanted is spared else hidden[wanted]

    def head(self, hidden: Tensor) -> Tensor:
        """As `Network`."""
        return self.model.lm_head(hidden)


@functools.cache
def _outside_compiled_layers() -> type[PagedLayer]:
    """What compiled code calls and does not look inside, where every layer is another."""

    class OutsideCompiledLayers(PagedLayer):
        @torch.compiler.disable  # loads torch's compiler, which takes most of a second
        def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            return super().attend(q, k, v, positions)

    return OutsideCompiledLayers
