"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from puna.config import Schedule


def learning_rate(update: int, schedule: Schedule, *, peak_lr: float, steps: int) -> float:
    """The learning rate of one optimizer update.

    Args:
        update: counted from 1. The peak is reached at update `warmup_steps`, the final value at update `steps`.
        schedule: shape and warm-up.
        peak_lr: the highest value.
        steps: updates of the whole run.

    Returns:
        peak * update / warmup while warming up; then the shape, from the peak to `final_fraction` of it.
    """
    warmup = schedule.warmup_steps
    if update < warmup:
        return peak_lr * update / warmup
    done = min(1.0, (update - warmup) / max(1, steps - warmup))
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule.name]
    floor = 1.0 if schedule.name == "constant" else schedule.final_fraction
    return peak_lr * (floor + (1 - floor) * left)
