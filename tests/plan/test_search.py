"""The search, which shares its work among layouts, finds what judging them one after another finds."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from puna.config import Recipe, load_recipe
from puna.devices import PROFILES
from puna.errors import UsageError
from puna.model.config import PRESETS
from puna.model.split import divisors
from puna.plan.case import RECOMPUTE
from puna.plan.memory import Footprint
from puna.plan.search import MOST, Judged, Search, overrides_of
from puna.plan.speed import Cluster, Pace

DEVICES = 8

#: Name -> changes of the recipe, and GiB of each device.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "with pipelines": ({}, 64),
    "compiled, 24 rows": ({"compile": True, "optimizer.state_bits": 8, "batch_tokens": 24 * 4096}, 64),
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


@pytest.mark.parametrize("name", CASES)
def test_quick_bounds_of_memory_and_time_hold(name: str) -> None:
    changes, memory_gib = CASES[name]
    recipe = load_recipe("codellama-7b-pretrain", {"batch_tokens": 16 * 4096, **changes})
    search = Search(recipe, PRESETS["codellama-7b"], Cluster(PROFILES["h100"]), DEVICES, memory_gib)
    for judged in _one_by_one(search):
        assert judged.memory.total <= judged.footprint.at_most
        assert judged.pace.at_least(judged.recompute) <= judged.speed.step_seconds


def test_few_layouts_of_many_are_judged_to_the_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    for owner, name in ((Footprint, "memory"), (Pace, "speed")):
        exact = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, exact=exact, name=name: asked.update([name]) or exact(*args))
    recipe = load_recipe("codellama-7b-pretrain", {"batch_tokens": 512 * 4096})
    found = Search(recipe, PRESETS["codellama-7b"], Cluster(PROFILES["h200"]), 512, 139).run(5)
    assert found.fitting > 5_000
    assert max(asked.values()) < found.fitting / 10


def test_products_in_fp32_are_timed_at_the_rate_of_fp32() -> None:
    seconds = {}
    for precision in ("bf16", "fp32"):
        recipe = load_recipe("codellama-7b-pretrain", {"precision": precision})
        search = Search(recipe, PRESETS["codellama-7b"], Cluster(PROFILES["a100-80"]), DEVICES, 10_000)
        seconds[precision] = search.judge(recipe).speed.rows
    for row in ("products", "attention"):
        assert seconds["fp32"][row] == pytest.approx(seconds["bf16"][row] * 312 / 19.5)


def _one_by_one(search: Search) -> list[Judged]:
    judged = []
    sizes = [divisors(DEVICES)] * 4
    orders = [("1f1b", 1), *product(("interleaved", "zero-bubble"), (2, 3, 4, 6, 8))]
    rows = range(1, MOST["micro_batch_rows"] + 1)
    for pp, replicate, cp, tp in product(*sizes):
        shard = DEVICES // (pp * replicate * cp * tp)
        if pp * replicate * shard * cp * tp != DEVICES:
            continue
        for (schedule, stages), micro_batch_rows in product(orders, rows):
            parallel = search.recipe.parallel.model_copy(
                update={"pp": pp, "dp_replicate": replicate, "dp_shard": shard, "cp": cp, "tp": tp,
                        "schedule": schedule, "stages_per_rank": stages}
            )  # fmt: skip
            fields = {"parallel": parallel, "micro_batch_rows": micro_batch_rows}
            judged += _recomputations(search, search.recipe.model_copy(update=fields))
    return judged


def _recomputations(search: Search, recipe: Recipe) -> Iterator[Judged]:
    """Every mode in all layers; in as few layers as fit, where not to recompute does not fit."""
    keeps_all = None
    for mode in RECOMPUTE:
        if mode == "selective" and recipe.compile:
            continue  # as none
        n_layers = range(1, 33 if keeps_all is not None and not search.fits(keeps_all) else 1)
        found = []
        for layers in (None, *n_layers):
            variant = recipe.model_copy(update={"recompute": mode, "recompute_layers": layers})
            with contextlib.suppress(UsageError):
                found.append(search.judge(variant))
        yield from found[:1]
        keeps_all = found[0] if mode == "none" and found else keeps_all
        some = next((each for each in found[1:] if search.fits(each)), None)
        stage = -(-32 // found[0].layout.stages) if found else 0
        if some is not None and some.recompute.layers != stage:
            yield some


def test_no_more_layers_recompute_than_memory_asks_for() -> None:
    recipe = load_recipe("codellama-34b-finetune-32", {"recompute_layers": None})
    search = Search(recipe, PRESETS["codellama-34b"], Cluster(PROFILES["ascend-910b"]), 32, 61)
    best = search.run(1).best[0]
    layers = best.recompute.layers
    assert layers is not None
    assert 1 < layers < 48
    assert f"recompute_layers={layers}" in overrides_of(best.recipe, recipe)
    one_less = search.judge(best.recipe.model_copy(update={"recompute_layers": layers - 1}))
    assert search.fits(best)
    assert not search.fits(one_less)
    whole = search.judge(best.recipe.model_copy(update={"recompute_layers": None}))
    assert whole.speed.tokens_per_second < best.speed.tokens_per_second < one_less.speed.tokens_per_second


def _order(judged: Judged) -> tuple[float, float]:
    return judged.speed.step_seconds, judged.memory.total


def _said(judged: Judged, search: Search) -> tuple[Any, ...]:
    return overrides_of(judged.recipe, search.recipe), judged.memory.rows, judged.speed.rows
