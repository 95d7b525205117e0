"""Layers that are compiled, and activations that are computed again in the backward pass instead of being kept.

`block` keeps the input of each layer alone. `selective` also keeps what is dear to compute, matrix products and
attention, and computes norms, rotations and gates again; the compiler chooses likewise by itself, so on compiled layers
`none` and `selective` are the same. `offload` keeps what `block` keeps, in host memory.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from puna.model.llama import DecoderLayer, Llama, compile_layers
from puna.model.offload import Offload

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


def prepare_layers(
    model: Llama, *, recompute: str, is_compiled: bool, n_recomputed: int | None = None
) -> list[DecoderLayer]:
    """Makes every layer compute in the way given.

    Args:
        model: its weights may be on the meta device still.
        recompute: "none", "selective", "block" or "offload".
        is_compiled: compile each layer when it is first used.
        n_recomputed: how many layers recompute; None: all. They are the first, whose turn in the backward pass comes
            when what the others keep has been freed.

    Returns:
        The layers that do not recompute.
    """
    layers: list[Any] = list(model.model.layers)
    if is_compiled:  # first: what recomputes calls compiled code, while nothing around it could be compiled as a whole
        compile_layers(model)
    if recompute == "none" or (recompute == "selective" and is_compiled):
        return layers
    again: Any = partial(checkpoint, use_reentrant=False)
    if recompute == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    if recompute == "offload":
        again = partial(_offloaded, Offload(), again)
    n_recomputed = len(layers) if n_recomputed is None else n_recomputed
    for layer in layers[:n_recomputed]:
        layer.forward = partial(again, layer.forward)
    return layers[n_recomputed:]


def _offloaded(offload: Offload, again: Any, *args: Any) -> Any:
    """Runs a layer that recomputes; its input, which alone is saved, is saved on the host."""
    with offload.keeping():
        return again(*args)


def _policy(context: object, operation: torch._ops.OpOverload, *args: object, **kwargs: object) -> CheckpointPolicy:
    name = operation.name().split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
