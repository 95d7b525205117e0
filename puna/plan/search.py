"""Which layouts there are, which of them fit, and why the others do not.

A layout is judged as a run would judge it, by `Layout.of`, before its memory and its time are formed. Quick bounds
spare most layouts both: of one that surely fits, and surely is not among the fastest, nothing else is asked, so a
hundred thousand take seconds. What a recipe says beyond its layout (precision, optimizer, length, batch) stays.
"""

import math
import re
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from puna.config import Recipe
from puna.errors import UsageError
from puna.model.config import ModelConfig
from puna.model.split import divisors
from puna.parallel.layout import AXES, Layout
from puna.plan.case import RECOMPUTE, Case, Recompute
from puna.plan.memory import Footprint, Memory
from puna.plan.speed import Cluster, Pace, Passes, Speed
from puna.plan.weights import Weights

#: The largest values that are tried: of two axes, of stages a rank, and of rows in a micro-batch.
MOST = {"tp": 16, "cp": 64, "stages_per_rank": 8, "micro_batch_rows": 16}


@dataclass(frozen=True, eq=False)
class Judged:
    """A layout under a recomputation, with what it takes and gives."""

    case: Case
    recompute: Recompute
    footprint: Footprint
    pace: Pace

    @property
    def layout(self) -> Layout:
        """Its axes and micro-batches."""
        return self.case.layout

    @property
    def recipe(self) -> Recipe:
        """The recipe that asks for it."""
        return self.case.recipe.model_copy(update=self.recompute.fields)

    @cached_property
    def memory(self) -> Memory:
        """What it takes; of layouts that are neither near the limit nor fast nobody asks."""
        return self.footprint.memory(self.recompute)

    @cached_property
    def speed(self) -> Speed:
        """How fast it is; of layouts that do not fit, or are slow beyond doubt, nobody asks."""
        return self.pace.speed(self.recompute)


@dataclass
class Found:
    """The outcome of a search.

    Attributes:
        best: layouts that fit, the fastest first.
        fitting: how many fit.
        nearest: the layout of least memory among those that do not fit.
        too_large: how many those are.
        impossible: reason -> how many layouts it rules out, and one of them.
    """

    best: list[Judged] = field(default_factory=list)
    fitting: int = 0
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
        self._passes = Passes(cluster)  # of layouts of `recipe`

    def judge(self, recipe: Recipe) -> Judged:
        """What one layout takes and gives.

        Raises:
            UsageError: it is impossible.
        """
        layout = Layout.of(recipe, self.config, self.devices)
        case = self._case(recipe, layout)
        return Judged(case, case.recompute, Footprint(case), Pace(case, Passes(self.cluster)))

    def _case(self, recipe: Recipe, layout: Layout) -> Case:
        has_kernel = self.cluster.device.has_update_kernel
        return Case(recipe, self.config, layout, self.weights, self.is_cpu, has_kernel)

    def fits(self, judged: Judged) -> bool:
        """Whether its memory is there."""
        limit = self.memory_gib * 2**30
        return judged.footprint.at_most <= limit or judged.memory.total <= limit

    def run(self, best: int) -> Found:
        """Judges every layout and keeps the best."""
        found = Found()
        for judged in self._fitting(found):
            slowest = found.best[-1].speed.step_seconds if len(found.best) == best > 0 else math.inf
            if judged.pace.at_least(judged.recompute) <= slowest:
                insort(found.best, judged, key=lambda each: (each.speed.step_seconds, each.memory.total))
                del found.best[best:]
        return found

    def _fitting(self, found: Found) -> Iterator[Judged]:
        """The layouts that fit; the others are counted."""
        for case in self._cases(found):
            for judged in self._recomputations(case):
                if self.fits(judged):
                    found.fitting += 1
                    yield judged
                    continue
                found.too_large += 1
                if found.nearest is None or judged.memory.total < found.nearest.memory.total:
                    found.nearest = judged

    def _recomputations(self, case: Case) -> Iterator[Judged]:
        """Every mode in all layers, and where that is more than memory asks for, in no more than it does."""
        footprint, pace = Footprint(case), Pace(case, self._passes)

        def of(mode: str, layers: int | None = None) -> Judged:
            return Judged(case, Recompute(mode, layers), footprint, pace)

        keeps_all = of("none")
        yield keeps_all
        if case.recipe.parallel.schedule == "zero-bubble":  # two backward passes would compute everything twice
            return
        size = case.first_stages[0]
        for mode in RECOMPUTE[1:]:
            least = of(mode)
            if not case.layers_again(least.recompute, size):  # it is as to recompute nothing
                continue
            yield least
            if self.fits(keeps_all) or not self.fits(least):
                continue
            fewer = [of(mode, n) for n in range(1, size)]
            first = bisect_left(fewer, True, key=self.fits)
            if first < len(fewer):
                yield fewer[first]

    def _cases(self, found: Found) -> Iterator[Case]:
        """Every possible layout with every number of rows, recomputing nothing."""
        for axes in self._axes():
            parallel = self.recipe.parallel.model_copy(update=axes)
            recipe = self.recipe.model_copy(
                update={"parallel": parallel, "micro_batch_rows": 1, **Recompute("none").fields}
            )
            try:
                layout = Layout.of(recipe, self.config, self.devices)
            except UsageError as error:
                _count(found.impossible, str(error))
                continue
            for rows in _up_to(divisors(layout.rows_per_rank), MOST["micro_batch_rows"]):
                variant = recipe.model_copy(update={"micro_batch_rows": rows})
                try:
                    yield self._case(variant, Layout.of(variant, self.config, self.devices))
                except UsageError as error:
                    _count(found.impossible, str(error))

    def _axes(self) -> Iterator[dict[str, Any]]:
        """Sizes of the axes and orders of the pipeline."""
        most_cp = 1 if self.recipe.arithmetic == "mindformers" else MOST["cp"]  # as recipes have it
        for tp in _up_to(divisors(self.devices), MOST["tp"]):
            for cp in _up_to(divisors(self.devices // tp), most_cp):
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
    for name in ("micro_batch_rows", "recompute", "recompute_layers"):
        before, now = getattr(base, name), getattr(recipe, name)
        if before != now:
            words.append(f"{name}={'null' if now is None else now}")
    return words


def _up_to(numbers: list[int], most: int) -> list[int]:
    return [number for number in numbers if number <= most]


def _count(reasons: dict[str, tuple[int, str]], message: str) -> None:
    """Counts a message under its first reason, whatever its numbers are."""
    reason = _reason(message)
    count, example = reasons.get(reason, (0, message))
    reasons[reason] = (count + 1, example)


@cache
def _reason(message: str) -> str:
    """The first of a message's reasons, with no numbers in it."""
    return re.sub(r"[\d, ]*\d", "#", re.sub(r"\[.*?\]", "", message.split(";")[0]))
