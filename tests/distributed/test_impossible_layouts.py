"""A layout that cannot be is refused before anything starts, with the values that would do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from puna.config import load_recipe
from puna.errors import UsageError
from puna.model.config import preset
from puna.parallel.layout import Layout
from puna.parallel.pipeline import check_schedule


def _layout(devices: int, changes: dict[str, Any], **of_model: Any) -> Layout:
    fields = {"model": "codellama-34b", "data": {"train": "data"}, "run_dir": "run", "sequence_length": 4096,
              "batch_tokens": 8 * 4096, "steps": 1}  # fmt: skip
    recipe = load_recipe({**fields, **changes})
    return Layout.of(recipe, replace(preset(recipe.model), **of_model), devices)


@pytest.mark.parametrize(
    ("devices", "changes", "message"),
    [
        (16, {"parallel": {"tp": 16}}, r"tp=16 must divide the 8 key/value heads; use one of \[1, 2, 4, 8\]"),
        (6, {"parallel": {"tp": 4}}, r"the 6 devices there are; start 4 processes \(--nproc 4, or puna launch"),
        (3, {"parallel": {"dp_shard": 3}}, r"8 rows of a batch cannot be shared by dp_replicate x dp_shard = 3"),
        (2, {"micro_batch_rows": 8}, r"micro_batch_rows=8 must divide the 4 rows of a rank .*use one of \[1, 2, 4\]"),
        (64, {"parallel": {"pp": 64, "dp_shard": 1}}, r"48"),
        (16, {"parallel": {"pp": 16, "dp_shard": 1}}, r"8 micro-batches cannot fill a pipeline of parallel.pp=16"),
        (2, {"parallel": {"cp": 2}, "sequence_length": 4094, "batch_tokens": 8 * 4094}, r"use 4092 or 4096"),
        (
            2,
            {"parallel": {"pp": 2, "schedule": "zero-bubble", "stages_per_rank": 2}, "recompute": "block"},
            r"cannot recompute; use interleaved, or recompute=none",
        ),
        (
            2,
            {"parallel": {"pp": 2, "schedule": "zero-bubble", "stages_per_rank": 2}, "compile": True},
            r"zero-bubble does not work with compile=true",
        ),
        (
            2,
            {"parallel": {"pp": 2, "schedule": "zero-bubble", "stages_per_rank": 2}, "precision": "bf16-pure"},
            r"sums gradients in bf16 under .*use interleaved, or precision=bf16",
        ),
        (
            2,
            {
                "parallel": {"pp": 2, "schedule": "zero-bubble", "stages_per_rank": 2},
                "optimizer": {"in_backward": True},
            },
            r"keeps gradients on the device .*use interleaved, or optimizer.in_backward=false",
        ),
        (
            2,
            {"recompute": "block", "recompute_layers": 49},
            r"recompute_layers=49 is more than the 48 .*use 48 or less",
        ),
        (2, {"parallel": {"pp": 2, "schedule": "1f1b", "stages_per_rank": 2}}, r"needs stages_per_rank of 1"),
        (
            2,
            {"parallel": {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2}, "batch_tokens": 3 * 4096},
            r"schedule=interleaved needs micro-batches in multiples of pp=2, not 3; change micro_batch_rows or",
        ),
        (
            8,
            {"model": "codellama-7b", "parallel": {"tp": 8}, "optimizer": {"state_bits": 8}},
            r"state_bits=8: .*down_proj.weight: its 11008 columns, .* are not whole blocks of 64 .*state_bits=32",
        ),
    ],
)
def test_an_impossible_layout_is_refused_with_a_way_out(devices: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _layout(devices, changes)


def test_stages_cannot_share_a_head_that_is_the_embedding() -> None:
    with pytest.raises(UsageError, match=r"pp must be 1: the model's head is its embedding, which two stages cannot"):
        _layout(2, {"parallel": {"pp": 2}}, tie_word_embeddings=True)


def test_a_schedule_that_this_torch_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cpu"))
    check_schedule("interleaved")
    with pytest.raises(UsageError, match=r"needs torch 2.13 or newer, and this is 2.11.0\+cpu; .* interleaved"):
        check_schedule("zero-bubble")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    check_schedule("zero-bubble")


def test_gradients_of_a_split_backward_pass_are_sound_where_weights_are_sharded() -> None:
    parallel = {"pp": 2, "schedule": "zero-bubble", "stages_per_rank": 2}
    assert _layout(4, {"parallel": parallel, "precision": "bf16-pure", "optimizer": {"in_backward": True}}).is_sharded


def test_a_possible_layout_says_what_it_is() -> None:
    assert str(_layout(16, {"parallel": {"pp": 2, "tp": 8}})) == "pp 2 x tp 8"
