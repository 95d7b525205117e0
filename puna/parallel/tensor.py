"""Tensor parallelism: ranks share every matrix, and between the matrices the tokens of each row.

    tokens shared: norm ─▶ gather tokens ─▶ q, k, v: heads shared ─▶ o ─▶ sum, share tokens again ─▶ add to the stream

What is cut, and along which dim, is `SPLIT_DIM`. Norms work on a rank's own tokens, so the stream between the matrices
takes 1/tp of the memory. Every weight is a DTensor, for sharding, optimizer and checkpoints to see what it is part of;
modules compute with the plain tensors that this rank holds, so that no operation is dispatched in Python, and the
compiler sees a layer like any other, with two gathers and two sums.
"""

from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from puna.model.llama import Embedding, Linear, Llama, RMSNorm
from puna.model.split import split_dim
from puna.parallel.collectives import gather_dim, scatter_sum
from puna.parallel.embedding import embed_part

#: The dim of activations (B, T, D) that holds the tokens.
TOKENS = 1


def split_weights(model: Llama, mesh: DeviceMesh) -> None:
    """Cuts the weights of a model, or of a pipeline stage of one, over the ranks of `mesh` (tp)."""
    decoder, group = model.model, mesh.get_group()
    # the same objects on all layers, or the compiler would compile each layer for itself
    gather, scatter = partial(_gather_result, group), partial(_scatter_result, group)
    for name, module in model.named_modules():
        for leaf, weight in list(module.named_parameters(recurse=False)):
            dim = split_dim(f"{name}.{leaf}")
            placement = Replicate() if dim is None else Shard(dim)
            module.register_parameter(leaf, nn.Parameter(distribute_tensor(weight, mesh, [placement])))
        if isinstance(module, RMSNorm) and module is not decoder.norm:  # the loss gathers what that one gives
            module.register_forward_hook(gather)
        elif isinstance(module, Linear) and split_dim(f"{name}.weight") == 1:
            module.register_forward_hook(scatter)
    if isinstance(decoder.embed_tokens, Embedding):
        decoder.embed_tokens.forward = partial(_embed, decoder.embed_tokens, group)  # type: ignore[method-assign]
    if model.config.tie_word_embeddings:
        model.lm_head.weight = decoder.embed_tokens.weight
    for unit in (decoder.embed_tokens, *decoder.layers, decoder.norm):  # the head is the loss's to multiply with
        weighted = [module for module in unit.modules() if module._parameters]
        unit.register_forward_pre_hook(partial(_take_parts, weighted, mesh.size()))


def gather_tokens(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A rank's tokens (B, T / tp, D) become all of the group's, (B, T, D); gradients are summed on the way back."""
    return hidden if group is None else gather_dim(hidden, TOKENS, group)


def _embed(table: Embedding, group: dist.ProcessGroup, ids: Tensor) -> Tensor:
    """(B, T) ids, the same on all ranks, to the vectors of this rank's tokens, (B, T / tp, D)."""
    return scatter_sum(embed_part(ids, table.weight, group), TOKENS, group)


def _gather_result(group: dist.ProcessGroup, _: object, __: object, normed: Tensor) -> Tensor:
    """A norm's result, (B, T / tp, D), for the matrices that it feeds, (B, T, D)."""
    return gather_tokens(normed, group)


def _scatter_result(group: dist.ProcessGroup, _: object, __: object, summand: Tensor) -> Tensor:
    """What a part of a matrix's inputs gives, (B, T, D), becomes the sum for this rank's tokens, (B, T / tp, D)."""
    return scatter_sum(summand, TOKENS, group)


def _take_parts(modules: list[nn.Module], size: int, *_: object) -> None:
    """Gives modules what this rank holds of their weights; an attribute of their own is found before a parameter."""
    for module in modules:
        for leaf, weight in module._parameters.items():
            if not isinstance(weight, DTensor):
                continue  # there is no bias
            if not weight.placements[0].is_replicate():
                part = weight.to_local()
            else:  # its gradient here is that of this rank's tokens
                part = weight.to_local(grad_placements=[Partial()])
                if isinstance(module, Linear):
                    part = part / size  # of a bias that each rank adds, and that is to be there once
            vars(module)[leaf] = part
