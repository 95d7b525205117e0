"""Cross-entropy summed over targets, without ever holding the logits of a long row.

Only positions that have a target are multiplied with the head, a chunk of them at a time, and the gradient of a chunk
is taken while its logits are there. What stays in memory is one chunk in fp32 and the two gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

#: Target of a position that asks for nothing.
IGNORE = -100

#: Logits computed at a time, in numbers: 2^24 fp32 values are 64 MiB.
CHUNK_LOGITS = 1 << 24


def summed_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, *, chunk_logits: int = CHUNK_LOGITS) -> Tensor:
    """The negative log-likelihood of the targets, summed, differentiable in `hidden` and `head`.

    Args:
        hidden: (B, T, D) what the head multiplies.
        head: (V, D) weights of the head, in any dtype; multiplied in the dtype of `hidden`.
        targets: (B, T) ids, or IGNORE.
        chunk_logits: how many logits to hold at a time.

    Returns:
        A fp32 scalar; softmax and sums are in fp32.
    """
    is_target = targets != IGNORE
    rows = max(1, chunk_logits // len(head))
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden[is_target], head, targets[is_target], rows)
    return loss


def reference_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The plain formula of `summed_cross_entropy`, all logits at once."""
    logits = F.linear(hidden, head.to(hidden.dtype)).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden (n, D), head (V, D), targets (n,) -> sum of -log p; both gradients are formed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, rows: int) -> Tensor:
        needs_grad = hidden.requires_grad or head.requires_grad
        weight = head.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_head = torch.zeros_like(head) if needs_grad else None
        for start in range(0, len(hidden), rows):
            x, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            logits = F.linear(x, weight).float()
            log_norm = logits.logsumexp(-1, keepdim=True)
            total += (log_norm - logits.gather(1, wanted)).sum()
            if grad_hidden is not None and grad_head is not None:
                slope = logits.sub_(log_norm).exp_()  # softmax minus one-hot
                slope.scatter_add_(1, wanted, torch.full_like(log_norm, -1.0))
                slope = slope.to(x.dtype)
                torch.mm(slope, weight, out=grad_hidden[start : start + rows])
                if grad_head.dtype == slope.dtype:
                    grad_head.addmm_(slope.t(), x)
                else:
                    grad_head += slope.t() @ x
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_head * grad.to(grad_head.dtype), None, None
