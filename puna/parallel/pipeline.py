"""The order in which a pipeline's micro-batches pass through its stages: torch's schedules, on our stages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from puna.errors import UsageError
from puna.parallel.mesh import Ranks
from puna.parallel.stage import Stage

#: Name in a recipe -> the schedule, and whether it takes one stage a rank or a list of them.
SCHEDULES: dict[str, tuple[Any, bool]] = {
    "1f1b": (Schedule1F1B, False),
    "interleaved": (ScheduleInterleaved1F1B, True),
    "zero-bubble": (ScheduleInterleavedZeroBubble, True),
}


def check_schedule(name: str) -> None:
    """Refuses a schedule that this version of torch cannot run.

    Raises:
        UsageError: the backward pass is split, and torch drops the loss's node before the head has its gradient.
    """
    if name == "zero-bubble" and torch.__version__ < "2.13":
        raise UsageError(
            f"parallel.schedule=zero-bubble needs torch 2.13 or newer, and this is {torch.__version__}; install it, or "
            f"use interleaved"
        )


def make_schedule(
    stages: list[Stage],
    ranks: Ranks,
    name: str,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    n_micro_batches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """The schedule of this rank's stages.

    Args:
        stages: of this rank, stage `pp_rank` first, then every pp-th.
        ranks: gives the group that stages send to each other in.
        name: a key of SCHEDULES.
        shape: rows and tokens of this rank in a micro-batch.
        dtype: of what stages send.
        device: of this rank.
        n_micro_batches: of a step.
        loss: (output of the last stage, targets) to a scalar; micro-batches' losses are summed, not averaged.
    """
    assert ranks.weights is not None
    group = ranks.weights.get_group("pp")
    rows, tokens = shape
    between = (rows, tokens // ranks.layout.tp)  # tensor-parallel ranks share the tokens of what passes on
    wrapped = []
    for place, stage in enumerate(stages):
        number = ranks.pp_rank + place * ranks.layout.pp
        sent = stage.output_like(*between, dtype).requires_grad_()
        taken = torch.empty(shape, dtype=torch.int64, device="meta") if stage.is_first else sent
        wrapped.append(
            PipelineStage(
                stage, number, ranks.layout.stages, device, input_args=(taken,), output_args=(sent,), group=group
            )
        )
    schedule, takes_many = SCHEDULES[name]
    return schedule(wrapped if takes_many else wrapped[0], n_micro_batches, loss_fn=loss, scale_grads=False)
