"""Activations that are computed again in the backward pass instead of being kept.

`block` keeps the input of each layer alone. `selective` also keeps what is dear to compute, matrix products and
attention, and computes norms, rotations and gates again.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from puna.model.llama import Llama

#: Operations whose results selective recomputation keeps.
KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
    "puna::attend_in_blocks",
}


def apply_recompute(model: Llama, mode: str) -> None:
    """Makes every layer of `model` recompute in the given mode: "none", "selective" or "block"."""
    if mode == "none":
        return
    recompute: Any = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        recompute = partial(recompute, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    for layer in model.model.layers:
        layer.forward = partial(recompute, layer.forward)


def _policy(context: object, operation: torch._ops.OpOverload, *args: object, **kwargs: object) -> CheckpointPolicy:
    name = operation.name().split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
