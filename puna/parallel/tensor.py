"""Tensor parallelism: ranks share every matrix, and between the matrices the tokens of each row.

    tokens shared: norm ─▶ gather tokens ─▶ q, k, v: heads shared ─▶ o ─▶ sum, share tokens again ─▶ add to the stream

What is cut, and along which dim, is `SPLIT_DIM`; this file reads it and hangs torch's styles on the modules. Norms work
on a rank's own tokens, so the stream between the matrices takes 1/tp of the memory, and every weight is a DTensor.
"""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from puna.model.llama import DecoderLayer, Embedding, Linear, Llama, RMSNorm
from puna.model.split import split_dim
from puna.parallel.collectives import gather_dim

#: The dim of activations (B, T, D) that holds the tokens.
TOKENS = 1

#: The dim of the head and the embedding, both (V, D), that is cut.
VOCABULARY = 0


def split_weights(model: Llama, mesh: DeviceMesh) -> None:
    """Cuts the weights of a model, or of a pipeline stage of one, over the ranks of `mesh` (tp)."""
    styles = {name: style for name, module in model.named_modules() if (style := _style(name, module)) is not None}
    for name, module in model.named_modules():
        if isinstance(module, DecoderLayer):
            styles[f"{name}.self_attn"] = _gather_first(4)
            styles[f"{name}.mlp"] = _gather_first(0)
    parallelize_module(model, mesh, styles)
    if isinstance(model.lm_head, Linear):  # the loss multiplies with its weight; the module itself is never called
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        else:
            model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight, mesh, [Shard(VOCABULARY)]))


def gather_tokens(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A rank's tokens (B, T / tp, D) become all of the group's, (B, T, D); gradients are summed on the way back."""
    return hidden if group is None else gather_dim(hidden, TOKENS, group)


def _style(name: str, module: nn.Module) -> ParallelStyle | None:
    """How a module that has weights of its own is cut; the head is no one's to call."""
    if isinstance(module, Embedding):
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(TOKENS))
    if isinstance(module, RMSNorm):
        assert split_dim(f"{name}.weight") is None
        return SequenceParallel(use_local_output=True)
    if isinstance(module, Linear) and name != "lm_head":
        return ColwiseParallel() if split_dim(f"{name}.weight") == 0 else RowwiseParallel(output_layouts=Shard(TOKENS))
    return None


def _gather_first(n_others: int) -> PrepareModuleInput:
    """The first argument's tokens are gathered before the module runs; the others are left alone."""
    others = (None,) * n_others
    return PrepareModuleInput(
        input_layouts=(Shard(TOKENS), *others),
        desired_input_layouts=(Replicate(), *others),
    )
