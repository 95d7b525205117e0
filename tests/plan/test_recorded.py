"""What the plan says of memory against what was measured on an accelerator: benchmarks/results/gpu.json."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from puna.config import load_recipe
from puna.model.config import preset
from puna.parallel.layout import Layout
from puna.plan.case import Case
from puna.plan.memory import memory
from puna.plan.search import weights_of

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.json"
STEPS = [row for row in json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if row["what"] == "train"]


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row["case"])
def test_measured_memory_is_the_planned_one(row: dict[str, Any]) -> None:
    fields = row["recipe"]
    rows = fields["micro_batch_rows"] * row["micro_batches"]
    recipe = load_recipe(
        {"model": row["model"], "data": {"train": "random"}, "run_dir": "run", "steps": 1, "compile": True,
         "batch_tokens": fields["sequence_length"] * rows, **fields}
    )  # fmt: skip
    config = replace(preset(row["model"]), num_hidden_layers=row["layers"])
    planned = memory(Case(recipe, config, Layout.of(recipe, config, 1), weights_of(recipe, config)), with_runtime=False)
    assert planned.gib == pytest.approx(row["memory_gib"], rel=0.02)
