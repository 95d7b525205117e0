"""How contenders are timed: they take turns, so that what slows the machine down slows all of them."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class Taken:
    """A contender's turns.

    Attributes:
        seconds: of each that counts.
        answers: what each gave, those that only warmed up among them.
    """

    seconds: list[float] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def in_turn(
    contenders: Mapping[str, Callable[[int], Any]],
    rounds: int,
    *,
    warm_ups: int = 1,
    device: "torch.device | None" = None,
) -> dict[str, Taken]:
    """What each contender took and gave, one turn a round.

    Args:
        contenders: name -> a turn; it is told the number of its round, from 1.
        rounds: that count.
        warm_ups: rounds before them, in which things are loaded and compiled.
        device: waited for before and after each turn.
    """
    taken = {name: Taken() for name in contenders}
    for number in range(1, warm_ups + rounds + 1):
        for name, turn in contenders.items():
            seconds, answer = timed(partial(turn, number), device)
            taken[name].answers.append(answer)
            if number > warm_ups:
                taken[name].seconds.append(seconds)
    return taken


def timed(work: Callable[[], Any], device: "torch.device | None" = None) -> tuple[float, Any]:
    """Seconds of a piece of work, and what it gives."""
    _wait(device)
    started = time.perf_counter()
    answer = work()
    _wait(device)
    return time.perf_counter() - started, answer


def children_seconds() -> float:
    """Processor time of all processes that this one started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _wait(device: "torch.device | None") -> None:
    """Until an accelerator has done what it was told; a CPU has."""
    if device is not None and device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)
