"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from puna.config import Schedule


def learning_rate(update: int, schedule: Schedule, *, peak_lr: float, steps: int) -> float:
    """The learning rate of one optimizer update.

    Args:
        update: its number. The peak is reached at `warmup_steps`, the final value at `steps`.
        schedule: shape and warm-up.
        peak_lr: the highest value.
        steps: the number at which the schedule ends; a run takes the one behind its last update.

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
