"""One optimizer step: what a batch does to the weights."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from puna.data.loader import Batch
from puna.model.attention import Documents
from puna.model.llama import Llama
from puna.train.loss import IGNORE, summed_cross_entropy
from puna.train.optimizer import AdamW


@dataclass(frozen=True)
class StepResult:
    """What one step gave.

    Attributes:
        loss: mean over every target of the global batch.
        grad_norm: 2-norm of the gradient of that loss, before clipping.
        is_applied: False when loss or gradient were not finite and the weights were left alone.
    """

    loss: float
    grad_norm: float
    is_applied: bool


def train_step(
    model: Llama, optimizer: AdamW, batch: Batch, *, update: int, lr: float, micro_batch_rows: int, max_grad_norm: float
) -> StepResult:
    """One optimizer step over the global batch.

    The loss is the mean over every target of the batch, so it does not depend on how the batch is cut into
    micro-batches. A loss or gradient that is not finite never reaches the weights.

    Args:
        model: in training mode; gradients are None before and after.
        optimizer: over the model's parameters.
        batch: (B, T) tokens, targets, documents, positions.
        update: number of this update, from 1.
        lr: learning rate.
        micro_batch_rows: rows that go through the model at once.
        max_grad_norm: gradients are scaled down to this norm.
    """
    n_targets = max(1, int((batch.targets != IGNORE).sum()))
    loss = 0.0
    for start in range(0, len(batch.tokens), micro_batch_rows):
        share = batch_loss(model, batch[start : start + micro_batch_rows]) / n_targets
        share.backward()
        loss += share.item()
    norm = grad_norm(model)
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    if is_finite:
        optimizer.step(update, lr, grad_scale=min(1.0, max_grad_norm / (norm + 1e-6)))
    model.zero_grad(set_to_none=True)
    return StepResult(loss, norm, is_finite)


def batch_loss(model: Llama, batch: Batch) -> Tensor:
    """The negative log-likelihood of a batch's targets, summed: a fp32 scalar."""
    device = model.lm_head.weight.device
    tokens, targets, positions = (
        torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(device)
        for x in (batch.tokens, batch.targets, batch.positions)
    )
    hidden = model.hidden(tokens, positions=positions, documents=Documents.of(batch.documents, device))
    return summed_cross_entropy(hidden, model.lm_head.weight, targets)


def grad_norm(model: Llama) -> float:
    """2-norm of all gradients together, summed in fp32."""
    norms = [p.grad.norm(dtype=torch.float32) for p in model.parameters() if p.grad is not None]
    return torch.stack(norms).norm().item() if norms else 0.0
