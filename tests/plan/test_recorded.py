"""What the plan says of memory and speed against what an accelerator did: benchmarks/results/gpu_train.json."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from puna.config import load_recipe
from puna.devices import PROFILES
from puna.model.config import preset
from puna.parallel.layout import Layout
from puna.plan.case import Case
from puna.plan.memory import memory
from puna.plan.search import weights_of
from puna.plan.speed import Cluster, Pace, Passes

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_train.json"
STEPS = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]


#: Measured when sums of gradients in bf16 were bf16, too.
OF_OLD = {"7b, rows of 16384"}


@pytest.mark.parametrize("row", [row for row in STEPS if row["case"] not in OF_OLD], ids=lambda row: row["case"])
def test_measured_memory_is_the_planned_one(row: dict[str, Any]) -> None:
    assert memory(_case(row), with_runtime=False).gib == pytest.approx(row["memory_gib"], rel=0.02)


@pytest.mark.parametrize("row", [row for row in STEPS if "parallel" not in row["recipe"]], ids=lambda row: row["case"])
def test_measured_speed_is_the_planned_one(row: dict[str, Any]) -> None:
    case = _case(row)
    planned = Pace(case, Passes(Cluster(PROFILES["h200"]))).speed(case.recompute)
    tolerance = 0.08 if "documents" in row["case"] else 0.05  # plans take a row as one document
    assert planned.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=tolerance)


def _case(row: dict[str, Any]) -> Case:
    fields = row["recipe"]
    rows = fields["micro_batch_rows"] * row["micro_batches"]
    recipe = load_recipe(
        {"model": row["model"], "data": {"train": "random"}, "run_dir": "run", "steps": 1, "compile": True,
         "batch_tokens": fields["sequence_length"] * rows, **fields}
    )  # fmt: skip
    config = replace(preset(row["model"]), num_hidden_layers=row["layers"])
    layout = Layout.of(recipe, config, recipe.parallel.tp)
    return Case(recipe, config, layout, weights_of(recipe, config), has_update_kernel=True)
