"""Exchanges between ranks: three that gradients flow through, and a few of plain numbers."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

#: Collectives that return what they make. Those that write into what they are given get gradients of zeros from torch
#: 2.11's compiler.
_functional = torch.ops._c10d_functional


def gather_dim(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Every rank's part along `dim`, in the order of ranks; each rank's gradient is the sum over all of them.

    Args:
        x: this rank's part, of the same shape everywhere.
        dim: along which the parts are joined.
        group: the ranks.
    """
    return _Gather.apply(x, dim, group)


def scatter_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, of which each gets its part along `dim`: the reverse of `gather_dim`; gradients are gathered.

    Args:
        x: this rank's summand, of the same shape everywhere; the group's size divides `dim`.
        dim: along which the sum is shared out, in the order of ranks.
        group: the ranks.
    """
    return _ScatterSum.apply(x, dim, group)


def exchange_dims(x: Tensor, gathered: int, scattered: int, group: dist.ProcessGroup) -> Tensor:
    """Gathers one dim of a tensor and scatters another: (…, T/n, …, N, …) becomes (…, T, …, N/n, …).

    Args:
        x: this rank's part.
        gathered: the dim that becomes whole.
        scattered: the dim that becomes this rank's part; the group's size divides it.
        group: the ranks.
    """
    return _Exchange.apply(x, gathered, scattered, group)


def all_sum(*numbers: float) -> list[float]:
    """The sum of each number over all ranks there are; on the host, in fp64."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def all_max(*numbers: float) -> list[float]:
    """The largest of each number over all ranks there are."""
    return _reduced(numbers, dist.ReduceOp.MAX)


def all_min(number: int, group: dist.ProcessGroup | None) -> int:
    """The smallest number that a rank of a group passes; without a group, this process's own."""
    if group is None:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MIN, group)
    return int(value)


def of_first_rank(value: T, group: dist.ProcessGroup | None = None) -> T:
    """The value that the first rank passes, on all ranks; what the others pass does not matter.

    Args:
        value: whatever can be pickled.
        group: of all ranks, which may be more patient than the one that is used otherwise.
    """
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, group=group, device=torch.device("cpu"))
    return held[0]


def _reduced(numbers: tuple[float, ...], operation: dist.ReduceOp.RedOpType) -> list[float]:
    if not dist.is_initialized():
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, operation)
    return values.tolist()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _scattered(grad, ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scattered(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _gathered(grad, ctx.dim, ctx.group), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gathered: int, scattered: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dims, ctx.group = (gathered, scattered), group
        return _exchanged(x, gathered, scattered, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gathered, scattered = ctx.dims
        return _exchanged(grad, scattered, gathered, ctx.group), None, None, None


def _exchanged(x: Tensor, gathered: int, scattered: int, group: dist.ProcessGroup) -> Tensor:
    sent = x.unflatten(scattered, (group.size(), -1)).movedim(scattered, 0).contiguous()
    return _all_to_all(sent, group).movedim(0, gathered).flatten(gathered, gathered + 1)


def _gathered(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    size, name = group.size(), group.group_name
    if x.device.type == "cpu":
        # Gloo's own gather (that of the functional collectives) ends in a race of its two threads, which free the name
        # of the collective twice; found in torch 2.11 to 2.15. This is as fast, and twice as fast for few tokens.
        parts = _all_to_all(x.expand(size, *x.shape).contiguous(), group)
    else:
        parts = _functional.wait_tensor(_functional.all_gather_into_tensor(x.contiguous(), size, name))
        parts = parts.unflatten(0, (size, -1))
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _scattered(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).flatten(0, 1).contiguous()
    return _functional.wait_tensor(_functional.reduce_scatter_tensor(parts, "sum", group.size(), group.group_name))


def _all_to_all(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Part i of the first dim goes to rank i; part i of the result came from there."""
    sizes = [1] * group.size()
    return _functional.wait_tensor(_functional.all_to_all_single(sent, sizes, sizes, group.group_name))
