"""Weights in the dtype in which they are multiplied, beside those in fp32 that are trained.

    originals, fp32  ── refresh, once an update ──▶  casts, bf16, in the network
        .grad, fp32  ◀── added, every micro-batch ──  their gradients, bf16

A network that has the originals alone casts each of them in every micro-batch, casts its gradient back, and then adds
it: 26 bytes a weight pass through memory where 12 will do. The numbers are the same to the last bit. For weights that
are shared out `fully_shard` does likewise.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Casts:
    """Casts of the matrices of layers, which take their place in the layers.

    The gradients go to the originals, whose hooks are called for each. A cast lives as long as its layer: a layer that
    keeps its cast weights for the backward pass takes no more memory with it than without.

    Args:
        layers: of a network, on their device.
        dtype: of the casts.
    """

    def __init__(self, layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
        self._of_original: list[tuple[Tensor, Tensor]] = []
        for module in (module for layer in layers for module in layer.modules()):
            if isinstance(module, nn.Linear):
                original = module.weight
                cast = module.weight = nn.Parameter(torch.empty_like(original, dtype=dtype))
                cast.register_post_accumulate_grad_hook(partial(_pass_on, original))
                self._of_original.append((original, cast))

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes them what the originals are now."""
        for original, cast in self._of_original:
            cast.copy_(original)


@torch.no_grad()
def _pass_on(original: Any, cast: Any) -> None:
    grad, cast.grad = cast.grad, None
    if original.grad is None:
        original.grad = grad.to(original.dtype)
    else:
        original.grad.add_(grad)
    for hook in list((original._post_accumulate_grad_hooks or {}).values()):
        hook(original)
