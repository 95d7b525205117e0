"""Cross-entropy summed over targets, without ever holding the logits of a long row.

Only positions that have a target are multiplied with the head, a chunk of them at a time, and the gradient of a chunk
is taken while its logits are there: softmax is formed in fp32, in place, a few rows at a time. What stays in memory is
one chunk and the two gradients.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from puna.parallel.collectives import gather_dim
from puna.train.loss_kernel import kernel_for

#: Target of a position that asks for nothing.
IGNORE = -100

#: Logits computed at a time, in numbers: 2^25 bf16 values are 64 MiB.
CHUNK_LOGITS = 1 << 25

#: A chunk's rows are rounded down to a multiple of this: products on a CPU are a fifth faster.
ROWS = 64

#: Logits that go through softmax at a time: on a CPU they stay in its cache from the first pass to the last.
PIECE = {"cpu": 1 << 19}
PIECE_ELSEWHERE = 1 << 26


def summed_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The negative log-likelihood of the targets, summed and scaled, differentiable in `hidden` and `head`.

    Args:
        hidden: (B, T, D) what the head multiplies.
        head: (V, D) weights of the head, in any dtype; multiplied in the dtype of `hidden`.
        targets: (B, T) ids, or IGNORE.
        scale: multiplies the sum, and in fp32 the gradients. One that comes later, through `backward`, is rounded to
            the dtype of `hidden`: in bf16 all gradients below would be off by up to 0.4 %, the same way.
        chunk_logits: how many logits to hold at a time.
        group: ranks that hold (V / n, D) of the head each, in order, and the same `hidden`; None: the head is whole.

    Returns:
        A fp32 scalar, the same on every rank; softmax and sums are in fp32. Each rank's gradient in `hidden` is what
        its part of the head gives: the sum over the group is the gradient.
    """
    is_target = targets != IGNORE
    rows = max(1, chunk_logits // len(head))
    rows -= rows % ROWS if rows > ROWS else 0
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden[is_target], head, targets[is_target], scale, rows, group)
    return loss


def reference_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The plain formula of `summed_cross_entropy`, all logits at once."""
    logits = F.linear(hidden, head.to(hidden.dtype)).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden (n, D), head (V, D), targets (n,) -> scaled sum of -log p; the forward pass forms both gradients."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, targets: Tensor, scale: float, rows: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        kernel = kernel_for(hidden, head)
        needs_grad = hidden.requires_grad or head.requires_grad
        weight = head.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_head = torch.zeros_like(head) if needs_grad and not len(hidden) else None
        first = 0 if group is None else group.rank() * len(head)
        room = hidden.new_empty(min(rows, len(hidden)), len(head))  # fresh memory for each chunk costs as much as exp
        for start in range(0, len(hidden), rows):
            x, wanted = hidden[start : start + rows], targets[start : start + rows, None] - first
            is_here = (wanted >= 0) & (wanted < len(head))
            wanted = wanted.clamp(0, len(head) - 1)
            logits = torch.mm(x, weight.t(), out=room[: len(x)])
            of_target = logits.gather(1, wanted).float().masked_fill_(~is_here, 0)
            log_norm = _softmax_(logits) if kernel is None else kernel.softmax_(logits)
            if group is not None:
                log_norm = _joined_(logits, of_target, log_norm, group)
            total += (log_norm - of_target).sum()
            if grad_hidden is not None:
                minus_one = (of_target - log_norm).expm1_().to(x.dtype)
                value = torch.where(is_here, minus_one, logits.gather(1, wanted))
                # scatter_ would copy all logits of a CPU
                slope = logits.index_put_((torch.arange(len(x), device=x.device), wanted[:, 0]), value[:, 0])
                grad_hidden[start : start + rows].addmm_(slope, weight, beta=0, alpha=scale)
                is_first = grad_head is None
                if grad_head is None:
                    grad_head = torch.empty_like(head, dtype=torch.float32 if kernel is not None else None)
                if grad_head.dtype == slope.dtype:
                    grad_head.addmm_(slope.t(), x, beta=0 if is_first else 1, alpha=scale)
                elif is_first:
                    grad_head.copy_(slope.t() @ x)
                elif kernel is not None:
                    kernel.add_product_(grad_head, slope, x)
                else:
                    grad_head += slope.t() @ x
        if grad_head is not None and grad_head.dtype != hidden.dtype:
            grad_head.mul_(scale)
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return total.mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_head * grad.to(grad_head.dtype), None, None, None, None


def _joined_(logits: Tensor, of_target: Tensor, log_norm: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Makes the softmax over a part of the vocabulary one over the whole, in place; returns its log-norms."""
    dist.all_reduce(of_target, group=group)
    whole = gather_dim(log_norm, 1, group).logsumexp(1, keepdim=True)
    logits.mul_((log_norm - whole).exp_())
    return whole


def _softmax_(logits: Tensor) -> Tensor:
    """Turns (n, V) logits into their softmax, in place; returns the (n, 1) logarithms of its norms, in fp32."""
    log_norm = []
    for piece in logits.split(max(1, PIECE.get(logits.device.type, PIECE_ELSEWHERE) // logits.shape[1])):
        top = piece.amax(-1, keepdim=True).float()
        chances = piece.softmax(-1, dtype=torch.float32)
        log_norm.append(top - chances.amax(-1, keepdim=True).log())  # the largest is exp(0) / norm
        piece.copy_(chances)
    return torch.cat(log_norm)
