"""Which layouts there are, which of them fit, and why the others do not.

A layout is judged as a run would judge it, by `Layout.of`, before its memory and its time are formed; thousands take
seconds. What a recipe says beyond its layout (precision, optimizer, length, batch) stays as it is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from puna.config import Recipe
from puna.errors import UsageError
from puna.model.config import ModelConfig
from puna.model.split import divisors
from puna.parallel.layout import AXES, Layout
from puna.plan.case import Case
from puna.plan.memory import Memory, memory
from puna.plan.speed import Cluster, Speed, speed
from puna.plan.weights import Weights

#: The most that is tried of an axis, of runs of layers a rank, and of rows at once.
MOST = {"tp": 16, "cp": 64, "stages_per_rank": 8, "micro_batch_rows": 16}

RECOMPUTE = ("none", "selective", "block", "offload")


@dataclass(frozen=True, eq=False)
class Judged:
    """A layout with what it takes and gives."""

    recipe: Recipe
    layout: Layout
    memory: Memory
    case: Case
    cluster: Cluster

    @cached_property
    def speed(self) -> Speed:
        """How fast it is; of layouts that do not fit nobody asks."""
        return speed(self.case, self.cluster)


@dataclass
class Found:
    """The outcome of a search.

    Attributes:
        fitting: layouts that fit, fastest first.
        nearest: the layout of least memory among those that do not fit.
        too_large: how many those are.
        impossible: reason -> how many layouts it rules out, and one of them.
    """

    fitting: list[Judged] = field(default_factory=list)
    nearest: Judged | None = None
    too_large: int = 0
    impossible: dict[str, tuple[int, str]] = field(default_factory=dict)


class Search:
    """All layouts of a recipe on some devices.

    Args:
        recipe: its precision is settled.
        config: shape of the model.
        cluster: what the ranks run on.
        devices: how many.
        memory_gib: of each.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, cluster: Cluster, devices: int, memory_gib: float) -> None:
        self.recipe, self.config, self.cluster, self.devices, self.memory_gib = (
            recipe, config, cluster, devices, memory_gib,
        )  # fmt: skip
        self.is_cpu = cluster.device.name == "CPU"
        self.weights = weights_of(recipe, config)

    def judge(self, recipe: Recipe) -> Judged:
        """What one layout takes and gives.

        Raises:
            UsageError: it is impossible.
        """
        layout = Layout.of(recipe, self.config, self.devices)
        if reason := self.weights.misfit(layout.tp):
            raise UsageError(reason)
        case = Case(recipe, self.config, layout, self.weights, self.is_cpu)
        return Judged(recipe, layout, memory(case), case, self.cluster)

    def fits(self, judged: Judged) -> bool:
        """Whether its memory is there."""
        return judged.memory.gib <= self.memory_gib

    def run(self) -> Found:
        """Judges every layout."""
        found = Found()
        for axes in self._axes():
            try:
                layout = Layout.of(self._with(axes, recompute="none", micro_batch_rows=1), self.config, self.devices)
            except UsageError as error:
                _count(found.impossible, str(error))
                continue
            if reason := self.weights.misfit(layout.tp):
                _count(found.impossible, reason)
                continue
            for rows in divisors(min(layout.rows_per_rank, MOST["micro_batch_rows"])):
                for recompute in RECOMPUTE:
                    self._try(self._with(axes, recompute=recompute, micro_batch_rows=rows), found)
        found.fitting.sort(key=lambda each: (each.speed.step_seconds, each.memory.total))
        return found

    def _try(self, recipe: Recipe, found: Found) -> None:
        try:
            judged = self.judge(recipe)
        except UsageError as error:
            _count(found.impossible, str(error))
            return
        if self.fits(judged):
            found.fitting.append(judged)
            return
        found.too_large += 1
        if found.nearest is None or judged.memory.total < found.nearest.memory.total:
            found.nearest = judged

    def _axes(self) -> Iterator[dict[str, Any]]:
        """Sizes of the axes and orders of the pipeline."""
        for tp in _up_to(divisors(self.devices), MOST["tp"]):
            for cp in _up_to(divisors(self.devices // tp), MOST["cp"]):
                for pp in _up_to(divisors(self.devices // tp // cp), self.config.num_hidden_layers):
                    rest = self.devices // tp // cp // pp
                    for replicate in divisors(rest):
                        sizes = {"pp": pp, "dp_replicate": replicate, "dp_shard": rest // replicate, "cp": cp, "tp": tp}
                        yield from (sizes | order for order in self._orders(pp))

    def _orders(self, pp: int) -> Iterator[dict[str, Any]]:
        yield {"schedule": "1f1b", "stages_per_rank": 1}
        if pp > 1:
            most = min(MOST["stages_per_rank"], self.config.num_hidden_layers // pp)
            for stages in (n for n in (2, 3, 4, 6, 8) if n <= most):
                yield {"schedule": "interleaved", "stages_per_rank": stages}
                yield {"schedule": "zero-bubble", "stages_per_rank": stages}

    def _with(self, axes: dict[str, Any], **fields: Any) -> Recipe:
        parallel = self.recipe.parallel.model_copy(update=axes)
        return self.recipe.model_copy(update={"parallel": parallel, **fields})


def weights_of(recipe: Recipe, config: ModelConfig) -> Weights:
    """The weights that a recipe trains."""
    weight_bytes = 2 if recipe.precision == "bf16-pure" else 4
    return Weights(config, weight_bytes=weight_bytes, state_bits=recipe.optimizer.state_bits)


def overrides_of(recipe: Recipe, base: Recipe) -> list[str]:
    """What to write behind `puna train BASE` to get `recipe`'s layout."""
    words = []
    for name in (*AXES, "schedule", "stages_per_rank"):
        before, now = getattr(base.parallel, name), getattr(recipe.parallel, name)
        if before != now and not (before == "auto" and name == "dp_shard"):
            words.append(f"parallel.{name}={now}")
    for name in ("micro_batch_rows", "recompute"):
        if getattr(base, name) != getattr(recipe, name):
            words.append(f"{name}={getattr(recipe, name)}")
    return words


def _up_to(numbers: list[int], most: int) -> list[int]:
    return [number for number in numbers if number <= most]


def _count(reasons: dict[str, tuple[int, str]], message: str) -> None:
    """Counts a message under its first reason, whatever its numbers are."""
    reason = re.sub(r"[\d, ]*\d", "#", re.sub(r"\[.*?\]", "", message.split(";")[0]))
    count, example = reasons.get(reason, (0, message))
    reasons[reason] = (count + 1, example)
