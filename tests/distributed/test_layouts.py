"""Ten steps under any layout are the ten steps of one process: losses, gradient norms, and the rows that were read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import steps_of
from tests.train.conftest import write_random_folder

#: Processes -> layouts of so many, by name. Fields of `parallel`, and `micro_batch_rows` of the rank's rows.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp_shard 2": {"dp_shard": 2, "micro_batch_rows": 2},
        "dp_replicate 2": {"dp_replicate": 2, "dp_shard": 1, "micro_batch_rows": 2},
        "tp 2": {"tp": 2, "micro_batch_rows": 4},
        "cp 2, by heads": {"cp": 2, "micro_batch_rows": 4},
        "pp 2": {"pp": 2, "micro_batch_rows": 2},
        "pp 2, interleaved": {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2, "micro_batch_rows": 2},
        "pp 2, zero-bubble": {"pp": 2, "schedule": "zero-bubble", "stages_per_rank": 2, "micro_batch_rows": 2},
    },
    4: {
        "dp_shard 4": {"dp_shard": 4, "layers_per_unit": 2, "reshard": False},
        "tp 4": {"tp": 4, "micro_batch_rows": 8},
        "cp 4, by heads": {"cp": 4, "micro_batch_rows": 8},
        "pp 4": {"pp": 4, "micro_batch_rows": 2},
        "tp 2, dp_shard 2": {"tp": 2, "dp_shard": 2, "micro_batch_rows": 2},
        "tp 2, dp_replicate 2": {"tp": 2, "dp_replicate": 2, "dp_shard": 1, "micro_batch_rows": 4},
        "dp_replicate 2, dp_shard 2": {"dp_replicate": 2, "dp_shard": 2},
        "pp 2, dp_shard 2, interleaved": {"pp": 2, "dp_shard": 2, "schedule": "interleaved", "stages_per_rank": 2},
    },
    8: {
        "cp 8, by keys": {"cp": 8, "micro_batch_rows": 8},
        "tp 2, pp 2, dp_shard 2": {"tp": 2, "pp": 2, "dp_shard": 2, "micro_batch_rows": 2},
        "cp 2, tp 2, dp_shard 2": {"cp": 2, "tp": 2, "dp_shard": 2, "micro_batch_rows": 4},
        "dp_replicate 2, dp_shard 2, cp 2": {"dp_replicate": 2, "dp_shard": 2, "cp": 2, "micro_batch_rows": 2},
        "cp 4, tp 2, by keys": {"cp": 4, "tp": 2, "micro_batch_rows": 8},
        "pp 2, cp 2, tp 2": {"pp": 2, "cp": 2, "tp": 2, "micro_batch_rows": 4},
        "dp_replicate 2, pp 2, tp 2": {"dp_replicate": 2, "dp_shard": 1, "pp": 2, "tp": 2, "micro_batch_rows": 2},
        "pp 2, cp 2, dp_shard 2, interleaved": {
            "pp": 2, "cp": 2, "dp_shard": 2, "schedule": "interleaved", "stages_per_rank": 2, "micro_batch_rows": 2,
        },
    },
}  # fmt: skip

#: Fields of a recipe that are not under `parallel`.
OWN_FIELDS = {"micro_batch_rows"}


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe over packed documents of 5 to 60 tokens: rows have targets in uneven numbers."""
    folder = write_random_folder(tmp_path_factory.mktemp("prepared"), seed=0)
    return {
        "model": "tiny-64",
        "data": {"train": str(folder), "fill": "whole-documents"},
        "sequence_length": 64,
        "run_dir": "unused",
        "steps": 10,
        "batch_tokens": 512,
        "precision": "fp32",
        "optimizer": {"peak_lr": 1e-3, "max_grad_norm": 0.5},
        "schedule": {"warmup_steps": 2},
        "device": "cpu",
    }


@pytest.fixture(scope="session")
def alone(content: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one process."""
    return steps_of(content, {})


@pytest.fixture(scope="session")
def results(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Processes -> the numbers of every layout of so many."""
    return {size: _run(size, content, tmp_path_factory.mktemp(f"ranks{size}")) for size in LAYOUTS}


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, layouts in LAYOUTS.items() for name in layouts])
def test_ten_steps_equal_those_of_one_process(
    size: int, name: str, results: dict[int, dict[str, Any]], alone: dict[str, Any]
) -> None:
    numbers = results[size][name]
    assert numbers["rows"] == alone["rows"]
    assert numbers["n_targets"] == alone["n_targets"]
    assert numbers["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert numbers["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    assert numbers["measured"] == pytest.approx(alone["measured"], rel=1e-5)


def test_the_steps_that_are_compared_learn_and_clip_and_have_uneven_targets(alone: dict[str, Any]) -> None:
    assert alone["loss"][-1] < alone["loss"][0] - 0.01
    assert min(alone["grad_norm"]) > 0.5
    assert len(set(alone["n_targets"])) > 1


def _run(size: int, content: dict[str, Any], folder: Path) -> dict[str, Any]:
    layouts = {
        name: {field if field in OWN_FIELDS else f"parallel.{field}": value for field, value in fields.items()}
        for name, fields in LAYOUTS[size].items()
    }
    recipe, wanted, results = folder / "recipe.json", folder / "layouts.json", folder / "results.json"
    recipe.write_text(json.dumps(content))
    wanted.write_text(json.dumps(layouts))
    worker = Path(__file__).with_name("layouts.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), worker]
    done = subprocess.run(
        [*command, recipe, wanted, results], capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(results.read_text())
