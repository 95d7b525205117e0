"""The search, which shares its work among layouts, finds what judging them one after another finds."""

from itertools import product
from typing import Any

import pytest

from puna.config import load_recipe
from puna.devices import PROFILES
from puna.errors import UsageError
from puna.model.config import PRESETS
from puna.model.split import divisors
from puna.plan.search import MOST, RECOMPUTE, Judged, Search, overrides_of
from puna.plan.speed import Cluster

DEVICES = 8

#: Name -> changes of the recipe, and GiB of each device.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "with pipelines": ({}, 64),
    "compiled": ({"compile": True, "optimizer.state_bits": 8}, 64),
    "little memory": ({"optimizer.in_backward": True, "precision": "bf16-pure"}, 20),
}


@pytest.mark.parametrize("name", CASES)
def test_the_search_finds_what_judging_layouts_one_by_one_finds(name: str) -> None:
    changes, memory_gib = CASES[name]
    recipe = load_recipe("codellama-7b-pretrain", {"batch_tokens": 16 * 4096, **changes})
    search = Search(recipe, PRESETS["codellama-7b"], Cluster(PROFILES["h100"]), DEVICES, memory_gib)
    judged = list(_one_by_one(search))
    fitting = sorted((each for each in judged if search.fits(each)), key=_order)
    others = [each for each in judged if not search.fits(each)]
    found = search.run(5)
    assert found.fitting == len(fitting) > 5
    assert found.too_large == len(others)
    assert [_said(each, search) for each in found.best] == [_said(each, search) for each in fitting[:5]]
    assert found.nearest is not None
    assert found.nearest.memory.total == min(each.memory.total for each in others)


def _one_by_one(search: Search) -> list[Judged]:
    judged = []
    sizes = [divisors(DEVICES)] * 4
    orders = [("1f1b", 1), *product(("interleaved", "zero-bubble"), (2, 3, 4, 6, 8))]
    rows = range(1, MOST["micro_batch_rows"] + 1)
    for pp, replicate, cp, tp in product(*sizes):
        shard = DEVICES // (pp * replicate * cp * tp)
        if pp * replicate * shard * cp * tp != DEVICES:
            continue
        for (schedule, stages), recompute, micro_batch_rows in product(orders, RECOMPUTE, rows):
            if schedule == "1f1b" and stages > 1:
                continue
            parallel = search.recipe.parallel.model_copy(
                update={"pp": pp, "dp_replicate": replicate, "dp_shard": shard, "cp": cp, "tp": tp,
                        "schedule": schedule, "stages_per_rank": stages}
            )  # fmt: skip
            fields = {"parallel": parallel, "recompute": recompute, "micro_batch_rows": micro_batch_rows}
            try:
                judged.append(search.judge(search.recipe.model_copy(update=fields)))
            except UsageError:
                continue
    return judged


def _order(judged: Judged) -> tuple[float, float]:
    return judged.speed.step_seconds, judged.memory.total


def _said(judged: Judged, search: Search) -> tuple[Any, ...]:
    return overrides_of(judged.recipe, search.recipe), judged.memory.rows, judged.speed.rows
