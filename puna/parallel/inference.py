"""A model shared for generation: every rank holds its part of each matrix, and all of them the same tokens.

    embed_tokens: sum ─▶ [norm ─▶ q, k, v ─▶ own heads ─▶ o: sum ─▶ norm ─▶ gate, up ─▶ down: sum] ─▶ head: gather

What is cut, and along which dim, is `SPLIT_DIM`; this file reads it, and puts sums behind modules whose outputs are
parts. The head's parts are gathered: every rank has the same logits to the last bit, chooses the same tokens and needs
to be told nothing. Training shares the tokens between the matrices too (`tensor`); here they are few, and without
gradients.
"""

import torch.distributed as dist
from torch import Tensor, nn

from puna.errors import UsageError
from puna.model.config import ModelConfig
from puna.model.llama import Embedding, Linear, Llama
from puna.model.split import split_dim, split_misfit
from puna.parallel.collectives import gather_dim
from puna.parallel.embedding import embed_part
from puna.quantized import QuantizedLinear

HEAD = "lm_head"


class Share:
    """A rank's part of a model that all ranks of a group hold together: `puna.load(folder, share=Share)`.

    Args:
        config: of the whole model.
        group: the ranks; None: all there are.

    Raises:
        UsageError: so many ranks cannot share the model, and the message says how many can; or there are none.
    """

    def __init__(self, config: ModelConfig, group: dist.ProcessGroup | None = None) -> None:
        group = group or dist.group.WORLD
        if group is None:
            raise UsageError("a model is shared by processes that were started together; use --nproc, or torchrun")
        if reason := split_misfit(config, group.size(), "the number of processes"):
            raise UsageError(reason)
        self.group = group

    def index(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where a rank's part of a stored tensor lies in the whole.

        Args:
            name: of a weight, or of a tensor that holds a quantised one: its rows are the weight's, its columns groups
                of the weight's, or one for all.
            shape: of the whole.

        Raises:
            UsageError: a rank's part would end within a group.
        """
        owner, _, leaf = name.rpartition(".")
        dim = split_dim(name if leaf == "bias" else f"{owner}.weight")
        index = [slice(0, size) for size in shape]
        if dim is not None and shape[dim] > 1:
            size, rest = divmod(shape[dim], self.group.size())
            if rest:
                raise _cut_groups(name, shape[dim], self.group)
            index[dim] = slice(size * self.group.rank(), size * (self.group.rank() + 1))
        return tuple(index)

    def join(self, model: Llama) -> None:
        """Makes one model of the ranks' parts: from now on, what a rank computes in part is summed or gathered.

        Args:
            model: of the whole config, holding the tensors of `index`.

        Raises:
            UsageError: a rank's part ends within a group, of which a row has no more than one.
        """
        size = self.group.size()
        for name, module in list(model.named_modules()):
            if isinstance(module, Embedding):
                _replace(model, name, SummedEmbedding(module, self.group))
            elif isinstance(module, Linear | QuantizedLinear) and split_dim(f"{name}.weight") == 1:
                group_size = module.group_size if isinstance(module, QuantizedLinear) else None
                module.in_features //= size
                if group_size is not None and module.in_features % group_size:
                    raise _cut_groups(name, 1, self.group)  # whose scale looks to `index` like one of whole rows
                _replace(model, name, SummedLinear(module, self.group))
            elif isinstance(module, Linear | QuantizedLinear):
                module.out_features //= size
                if name == HEAD:
                    _replace(model, name, GatheredLinear(module, self.group))


def _cut_groups(name: str, groups: int, ranks: dist.ProcessGroup) -> UsageError:
    return UsageError(
        f"{name} has {groups} {'group' if groups == 1 else 'groups'} in a row, which {ranks.size()} processes cannot "
        "share; start fewer, or quantise with smaller groups"
    )


def _replace(model: Llama, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def group_of(model: Llama) -> dist.ProcessGroup | None:
    """The ranks that share a model; None: it is whole."""
    return model.lm_head.group if isinstance(model.lm_head, GatheredLinear) else None


class SummedEmbedding(nn.Module):
    """A table of which each rank holds some rows; the sum of what they find is the vector."""

    def __init__(self, table: Embedding, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = table.weight, group

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids of the whole vocabulary to (..., D)."""
        out = embed_part(ids, self.weight, self.group)
        dist.all_reduce(out, group=self.group)
        return out


class SummedLinear(nn.Module):
    """A linear layer of which each rank holds some inputs; the sum of the ranks' outputs is the output.

    A scheme that rounds activations by the row (fp8) rounds each rank's part of it for itself: a little finer than the
    whole row would be.
    """

    def __init__(self, linear: Linear | QuantizedLinear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.bias, linear.bias = linear.bias, None  # added once, not by every rank
        self.linear, self.group = linear, group

    def forward(self, x: Tensor) -> Tensor:
        """(..., in / tp) to (..., out)."""
        out = self.linear(x)
        dist.all_reduce(out, group=self.group)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class GatheredLinear(nn.Module):
    """A linear layer of which each rank holds some outputs, and gets those of the others."""

    def __init__(self, linear: Linear | QuantizedLinear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.linear, self.group = linear, group

    @property
    def weight(self) -> Tensor:
        """The part that this rank holds."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return gather_dim(self.linear(x), x.ndim - 1, self.group)
