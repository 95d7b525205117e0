"""One optimizer step: what a batch does to the weights."""

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from puna.data.loader import Batch
from puna.parallel.collectives import all_sum
from puna.parallel.model import DistributedModel
from puna.train.gradients import Gradients
from puna.train.loss import IGNORE, summed_cross_entropy


@dataclass(frozen=True)
class StepResult:
    """What one step gave.

    Attributes:
        loss: mean over every target of the global batch; nan where it has none.
        grad_norm: 2-norm of the gradient of that loss, before clipping.
        n_targets: of the global batch.
        is_applied: False when there was no target, and nothing was done, or when loss or gradient were not finite;
            `Gradients.if_not_finite` says what that means.
    """

    loss: float
    grad_norm: float
    n_targets: int
    is_applied: bool


def train_step(
    model: DistributedModel,
    gradients: Gradients,
    batch: Batch,
    *,
    update: int,
    lr: float,
    micro_batch_rows: int,
    max_grad_norm: float | None,
    is_mean_of_means: bool = False,
    skips_empty: bool = True,
) -> StepResult:
    """One optimizer step over the global batch; every rank calls it with its rows.

    The loss is the mean over every target of the global batch, so it depends neither on how the batch is cut into
    micro-batches nor on how many ranks share it. A gradient that is not finite never reaches the weights. A batch that
    asks for nothing leaves weights and optimizer alone: momentum and decay would move them without a reason.

    Args:
        model: in training mode.
        gradients: where they are kept, and the optimizer that uses them; empty before and after.
        batch: (B, T) tokens, targets, documents, positions: this rank's rows, whole.
        update: number of this update, from 1.
        lr: learning rate.
        micro_batch_rows: rows that go through the model at once.
        max_grad_norm: gradients are scaled down to this norm; None: they are used as they are.
        is_mean_of_means: take the mean of each micro-batch and the mean of those, as MindFormers does, which weighs the
            targets of a micro-batch that has few of them more.
        skips_empty: leave all alone where no row asks for a token; False moves weights by momentum and decay then, as
            MindFormers does.
    """
    layout = model.ranks.layout
    (counted,) = all_sum(float((batch.targets != IGNORE).sum()))
    n_targets = round(counted) // (layout.pp * layout.cp * layout.tp)  # ranks that hold the same rows count them too
    if skips_empty and not n_targets:
        return StepResult(math.nan, 0.0, 0, is_applied=False)
    gradients.begin(update, lr)
    loss = partial(_loss, model, scale=1 / max(1, n_targets))
    if is_mean_of_means:
        loss = partial(_mean_loss, model, n_means=layout.dp_size * len(batch.tokens) // micro_batch_rows)
    loss_share = model.forward_backward(batch, loss, micro_batch_rows=micro_batch_rows)
    mean_loss, squared_norm = all_sum(loss_share / layout.tp, gradients.squared_norm())
    norm = math.sqrt(squared_norm)
    is_finite = math.isfinite(mean_loss) and math.isfinite(norm)
    if is_finite:
        scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        gradients.optimizer.step(update, lr, grad_scale=scale, take=gradients.pop)
    gradients.clear()
    return StepResult(mean_loss, norm, n_targets, is_finite)


def summed_loss(model: DistributedModel, batch: Batch, *, micro_batch_rows: int) -> tuple[float, int]:
    """The summed loss over a batch's targets, and their number, over all ranks; no gradients."""
    layout = model.ranks.layout
    share = model.evaluate(batch, partial(_loss, model, scale=1.0), micro_batch_rows=micro_batch_rows)
    loss, counted = all_sum(share / layout.tp, float((batch.targets != IGNORE).sum()))
    return loss, round(counted) // (layout.pp * layout.cp * layout.tp)


def _loss(model: DistributedModel, hidden: Tensor, head: Tensor, targets: Tensor, *, scale: float) -> Tensor:
    return summed_cross_entropy(hidden, head, targets, scale=scale, group=model.ranks.tp)


def _mean_loss(model: DistributedModel, hidden: Tensor, head: Tensor, targets: Tensor, *, n_means: int) -> Tensor:
    n_targets = max(1, int((targets != IGNORE).sum()))
    return _loss(model, hidden, head, targets, scale=1 / (n_targets * n_means))
