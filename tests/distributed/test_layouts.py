"""Ten steps under any layout are the ten steps of one process: losses, gradient norms, and the rows that were read."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.config import Parallel
from tests.distributed.layouts import steps_of
from tests.train.conftest import write_random_folder

#: Processes -> layouts of so many, by name. Fields of `parallel`, or of the recipe.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp_shard 2": {"dp_shard": 2, "micro_batch_rows": 2},
        "dp_replicate 2": {"dp_replicate": 2, "dp_shard": 1, "micro_batch_rows": 2},
        "tp 2": {"tp": 2, "micro_batch_rows": 4},
        "tp 2, compiled layers recomputed": {
            "tp": 2, "micro_batch_rows": 4, "recompute": "block", "compile": True,
        },
        "tp 2, selected operations recomputed": {"tp": 2, "micro_batch_rows": 4, "recompute": "selective"},
        "cp 2, by heads": {"cp": 2, "micro_batch_rows": 4},
        "pp 2": {"pp": 2, "micro_batch_rows": 2},
        "pp 2, interleaved": {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2, "micro_batch_rows": 2},
        "pp 2, zero-bubble": {"pp": 2, "schedule": "zero-bubble", "stages_per_rank": 2, "micro_batch_rows": 2},
        "dp_shard 2, gradients on the host": {"dp_shard": 2, "optimizer.in_backward": True},
        "pp 2, gradients on the host": {"pp": 2, "micro_batch_rows": 2, "optimizer.in_backward": True},
        "dp_shard 2, used in the backward pass": {
            "dp_shard": 2, "micro_batch_rows": 4, "optimizer.in_backward": True, "optimizer.max_grad_norm": None,
        },
        "dp_shard 2, state of 8 bits": {"dp_shard": 2, "micro_batch_rows": 4, "optimizer.state_bits": 8},
        "pp 2, state of 4 bits": {"pp": 2, "micro_batch_rows": 4, "optimizer.state_bits": 4},
        "dp_shard 2, blocks recomputed": {"dp_shard": 2, "micro_batch_rows": 2, "recompute": "block"},
        "pp 2, one block of two recomputed": {
            "pp": 2, "micro_batch_rows": 2, "recompute": "block", "recompute_layers": 1,
        },
        "pp 2, blocks recomputed from the host": {"pp": 2, "micro_batch_rows": 2, "recompute": "offload"},
        "dp_shard 2, blocks recomputed from the host": {"dp_shard": 2, "micro_batch_rows": 2, "recompute": "offload"},
        "dp_shard 2, compiled layers recomputed": {
            "dp_shard": 2, "micro_batch_rows": 2, "recompute": "block", "compile": True,
        },
        "dp_shard 2, in bf16": {"dp_shard": 2, "micro_batch_rows": 4, "precision": "bf16"},
        "dp_shard 2, all in bf16": {"dp_shard": 2, "micro_batch_rows": 1, "precision": "bf16-pure"},
        "pp 2, all in bf16": {"pp": 2, "micro_batch_rows": 2, "precision": "bf16-pure"},
    },
    4: {
        "dp_shard 4": {"dp_shard": 4, "layers_per_unit": 2, "reshard": False},
        "tp 4": {"tp": 4, "micro_batch_rows": 8},
        "cp 4, by heads": {"cp": 4, "micro_batch_rows": 8},
        "pp 4": {"pp": 4, "micro_batch_rows": 2},
        "tp 2, dp_shard 2": {"tp": 2, "dp_shard": 2, "micro_batch_rows": 2},
        "tp 2, dp_shard 2, used in the backward pass": {
            "tp": 2, "dp_shard": 2, "micro_batch_rows": 4, "optimizer.in_backward": True,
            "optimizer.max_grad_norm": None,
        },
        "pp 2, tp 2, zero-bubble": {
            "pp": 2, "tp": 2, "schedule": "zero-bubble", "stages_per_rank": 2, "micro_batch_rows": 2,
        },
        "tp 2, dp_replicate 2": {"tp": 2, "dp_replicate": 2, "dp_shard": 1, "micro_batch_rows": 4},
        "tp 2, dp_shard 2, parts that are not even, and biases": {
            "tp": 2, "dp_shard": 2, "micro_batch_rows": 2, "intermediate_size": 178, "vocab_size": 514,
            "attention_bias": True, "attention_output_bias": True, "mlp_bias": True,
        },
        "dp_shard 4, the head is the embedding": {"dp_shard": 4, "tie_word_embeddings": True},
        "tp 2, dp_shard 2, the head is the embedding": {
            "tp": 2, "dp_shard": 2, "micro_batch_rows": 2, "tie_word_embeddings": True,
        },
        "dp_replicate 2, dp_shard 2": {"dp_replicate": 2, "dp_shard": 2},
        "dp_replicate 2, dp_shard 2, all in bf16": {"dp_replicate": 2, "dp_shard": 2, "precision": "bf16-pure"},
        "dp_replicate 2, dp_shard 2, gradients on the host": {
            "dp_replicate": 2, "dp_shard": 2, "optimizer.in_backward": True,
        },
        "tp 2, cp 2, selected operations recomputed": {
            "tp": 2, "cp": 2, "micro_batch_rows": 4, "recompute": "selective",
        },
        "pp 2, dp_shard 2, zero-bubble": {"pp": 2, "dp_shard": 2, "schedule": "zero-bubble", "stages_per_rank": 2},
        "pp 2, dp_shard 2, zero-bubble, all in bf16, gradients on the host": {
            "pp": 2, "dp_shard": 2, "schedule": "zero-bubble", "stages_per_rank": 2, "precision": "bf16-pure",
            "optimizer.in_backward": True,
        },
        "pp 2, dp_replicate 2, zero-bubble": {
            "pp": 2, "dp_replicate": 2, "dp_shard": 1, "schedule": "zero-bubble", "stages_per_rank": 2,
        },
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
#: Of four processes: compiled code, tensor parallelism and sharding at once, a minute on two cores.
COMPILED: dict[str, dict[str, Any]] = {
    "tp 2, dp_shard 2, compiled layers recomputed": {
        "tp": 2, "dp_shard": 2, "micro_batch_rows": 2, "recompute": "block", "compile": True,
    },
    "tp 2, cp 2, compiled": {"tp": 2, "cp": 2, "micro_batch_rows": 4, "compile": True},
}  # fmt: skip

if torch.__version__ < "2.13":
    for layouts in LAYOUTS.values():
        for name in [name for name in layouts if "zero-bubble" in name]:
            del layouts[name]  # refused

#: Changes of recipe and model that change the numbers, on one process as on several.
CHANGES = {
    "optimizer.max_grad_norm", "optimizer.state_bits", "precision",
    "intermediate_size", "vocab_size", "tie_word_embeddings", "attention_bias", "attention_output_bias", "mlp_bias",
}  # fmt: skip

#: Change -> how near the numbers are where they are rounded coarsely, and fp32's last bit can decide which way.
TOLERANCE = {"precision": 2e-2, "optimizer.state_bits": 1e-3}


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
def alone(content: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A function that gives the numbers of one process, with changes of the recipe."""
    return cache(lambda *changes: steps_of(content, dict(changes)))


@pytest.fixture(scope="session")
def results(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Processes -> the numbers of every layout of so many."""
    return {
        size: _run(size, layouts, content, tmp_path_factory.mktemp(f"ranks{size}")) for size, layouts in LAYOUTS.items()
    }


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, layouts in LAYOUTS.items() for name in layouts])
def test_ten_steps_equal_those_of_one_process(
    size: int, name: str, results: dict[int, dict[str, Any]], alone: Callable[..., dict[str, Any]]
) -> None:
    _check(results[size][name], LAYOUTS[size][name], alone)


@pytest.mark.slow
def test_ten_steps_of_compiled_layers_equal_those_of_one_process(
    content: dict[str, Any], alone: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    results = _run(4, COMPILED, content, tmp_path)
    for name, fields in COMPILED.items():
        _check(results[name], fields, alone)


def _check(numbers: dict[str, Any], fields: dict[str, Any], alone: Callable[..., dict[str, Any]]) -> None:
    changes = {field: value for field, value in fields.items() if field in CHANGES}
    expected = alone(*changes.items())
    tolerance = max(TOLERANCE.get(field, 1e-5) for field in [*changes, ""])
    assert numbers["rows"] == expected["rows"]
    assert numbers["n_targets"] == expected["n_targets"]
    assert numbers["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert numbers["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance)
    assert numbers["measured"] == pytest.approx(expected["measured"], rel=tolerance)
    assert numbers["moved_without_targets"] == 0


def test_the_steps_that_are_compared_learn_and_clip_and_have_uneven_targets(
    alone: Callable[..., dict[str, Any]],
) -> None:
    numbers = alone()
    assert numbers["loss"][-1] < numbers["loss"][0] - 0.01
    assert min(numbers["grad_norm"]) > 0.5
    assert len(set(numbers["n_targets"])) > 1


def _run(size: int, layouts: dict[str, Any], content: dict[str, Any], folder: Path) -> dict[str, Any]:
    layouts = {
        name: {
            f"parallel.{field}" if field in Parallel.model_fields else field: value for field, value in fields.items()
        }
        for name, fields in layouts.items()
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
