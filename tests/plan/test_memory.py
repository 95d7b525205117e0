"""The memory that a plan counts is what a step takes: tensors are counted as they are allocated, to the byte.

Ranks of a layout are taken one at a time, in this process, with torch's fake group: what the others would send is made
up, and everything is allocated as it would be.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from puna.config import Parallel, Recipe, load_recipe
from puna.data.loader import Batch
from puna.model import offload
from puna.model.config import preset
from puna.model.llama import initial_weight
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.plan import memory as plan
from puna.plan.case import Case
from puna.plan.memory import Memory, memory
from puna.plan.search import weights_of
from puna.train import loss, optimizer
from puna.train.build import build
from puna.train.gradients import IN_FLIGHT_BYTES
from puna.train.optimizer import local_part
from puna.train.step import train_step
from tests.plan.peak import peak_bytes

CONFIG = replace(
    preset("tiny-64"), hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, vocab_size=2048,
)  # fmt: skip

#: Devices and fields of `parallel`, or of the recipe.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp_shard 2": (2, {"batch_tokens": 1024}),
    "dp_shard 4, blocks recomputed": (4, {"recompute": "block", "micro_batch_rows": 2}),
    "dp_shard 2, whole weights in units of two layers": (
        2,
        {"layers_per_unit": 2, "reshard": False, "batch_tokens": 1024},
    ),
    "dp_replicate 2, dp_shard 2": (4, {"dp_replicate": 2}),
    "cp 2": (2, {"cp": 2, "micro_batch_rows": 2, "batch_tokens": 1024}),
    "pp 2, interleaved": (2, {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2}),
    "pp 2, dp_shard 2, interleaved, short rows": (
        4,
        {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2, "sequence_length": 64, "batch_tokens": 1024},
    ),
    "pp 2, dp_shard 2, interleaved, one round of micro-batches": (
        4,
        {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2, "batch_tokens": 1024},
    ),
    "pp 2, dp_shard 2, interleaved, one round of short rows": (
        4,
        {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2, "sequence_length": 64, "batch_tokens": 256},
    ),
    "pp 2, cp 2, interleaved": (
        8,
        {"pp": 2, "cp": 2, "schedule": "interleaved", "stages_per_rank": 2, "sequence_length": 128},
    ),
    "pp 2, zero-bubble": (2, {"pp": 2, "schedule": "zero-bubble", "stages_per_rank": 2}),
    "pp 2, dp_shard 2, zero-bubble": (4, {"pp": 2, "schedule": "zero-bubble", "stages_per_rank": 2}),
    "pp 2, dp_shard 2, blocks recomputed": (4, {"pp": 2, "recompute": "block"}),
    "pp 2, dp_shard 2, one block of two recomputed": (4, {"pp": 2, "recompute": "block", "recompute_layers": 1}),
    "pp 2, dp_shard 2, tp 2": (8, {"pp": 2, "tp": 2}),
}
if torch.__version__ < "2.13":
    LAYOUTS = {name: layout for name, layout in LAYOUTS.items() if "zero-bubble" not in name}  # refused

#: Changes of the recipe on one device.
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "products recomputed": {"recompute": "selective", "micro_batch_rows": 2},
    "products of three layers of four recomputed": {
        "recompute": "selective", "recompute_layers": 3, "micro_batch_rows": 4,
    },
    "two blocks of four recomputed": {"recompute": "block", "recompute_layers": 2, "micro_batch_rows": 4},
    "one block of four recomputed from the host": {
        "recompute": "offload", "recompute_layers": 1, "micro_batch_rows": 4,
    },
    "state of 8 bits": {"optimizer.state_bits": 8, "micro_batch_rows": 2},
    "state of 4 bits, gradients used at once": {
        "optimizer.state_bits": 4, "optimizer.in_backward": True, "optimizer.max_grad_norm": None,
        "micro_batch_rows": 4, "recompute": "block",
    },
    "bf16 over fp32, cast once": {"precision": "bf16", "micro_batch_rows": 2},
    "bf16 over fp32, one micro-batch": {"precision": "bf16", "micro_batch_rows": 4},
    "bf16 over fp32, two blocks of four recomputed": {
        "precision": "bf16", "micro_batch_rows": 1, "recompute": "block", "recompute_layers": 2,
    },
    "bf16, gradients summed in fp32": {"precision": "bf16-pure", "micro_batch_rows": 2},
    "bf16, one micro-batch": {"precision": "bf16-pure", "micro_batch_rows": 4},
    "bf16, state of 8 bits, gradients summed on the host": {
        "optimizer.state_bits": 8, "optimizer.in_backward": True, "micro_batch_rows": 2, "recompute": "block",
        "precision": "bf16-pure",
    },
    "bf16, state of 8 bits, gradients used at once": {
        "optimizer.state_bits": 8, "optimizer.in_backward": True, "optimizer.max_grad_norm": None,
        "micro_batch_rows": 4, "precision": "bf16-pure",
    },
}  # fmt: skip


def test_plans_know_the_limits_of_what_they_plan() -> None:
    assert plan.CHUNK_LOGITS == loss.CHUNK_LOGITS
    assert {True: loss.PIECE["cpu"], False: loss.PIECE_ELSEWHERE} == plan.SOFTMAX_PIECE
    assert {True: optimizer.PIECE["cpu"], False: optimizer.PIECE_ELSEWHERE} == plan.UPDATE_PIECE
    assert plan.OFFLOADS_IN_FLIGHT == offload.IN_FLIGHT
    assert plan.IN_FLIGHT_BYTES == IN_FLIGHT_BYTES


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_of_a_layout_takes_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "recv", lambda tensor, **_: tensor.fill_(1))  # whether a stage knows what it sends: yes
    _check_rank(*LAYOUTS[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own modules
def test_a_rank_under_tp_whose_layers_are_compiled_takes_what_is_planned() -> None:
    _check_rank(4, {"tp": 2, "micro_batch_rows": 4, "compile": True, "precision": "bf16"})


@pytest.mark.parametrize("name", SETTINGS)
def test_one_device_takes_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_one_device(SETTINGS[name], monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own modules
def test_one_device_whose_layers_are_compiled_takes_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    is_compiled = {"compile": True, "recompute": "selective"}  # recomputes nothing
    _check_one_device({"precision": "bf16", "micro_batch_rows": 1, **is_compiled}, monkeypatch)


def _check_rank(devices: int, fields: dict[str, Any]) -> None:
    recipe = _recipe(fields)
    layout = Layout.of(recipe, CONFIG, devices)
    planned = _planned(recipe, layout)
    with _fake_group(rank=planned.pp_rank * devices // layout.pp, size=devices):
        assert planned.total == pytest.approx(_measured(recipe, layout), rel=0.10)


def _check_one_device(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "kernel_for", lambda *_: None)  # planned is torch's way; a CPU's kernel takes 4 MiB less
    recipe = _recipe({"batch_tokens": 1024, **fields})
    layout = Layout.of(recipe, CONFIG, 1)
    assert _planned(recipe, layout).total == pytest.approx(_measured(recipe, layout), rel=0.05)


def _recipe(fields: dict[str, Any]) -> Recipe:
    content = {
        "model": "tiny-64", "data": {"train": "unused"}, "sequence_length": 256, "run_dir": "unused", "steps": 2,
        "batch_tokens": 2048, "precision": "fp32", "device": "cpu",
    }  # fmt: skip
    return load_recipe(content, {f"parallel.{k}" if k in Parallel.model_fields else k: v for k, v in fields.items()})


def _planned(recipe: Recipe, layout: Layout) -> Memory:
    return memory(Case(recipe, CONFIG, layout, weights_of(recipe, CONFIG), is_cpu=True), with_runtime=False)


@contextlib.contextmanager
def _fake_group(*, rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _measured(recipe: Recipe, layout: Layout) -> int:
    """Bytes of weights and optimizer state, and the most that two steps allocate beyond them."""
    device = torch.device("cpu")
    model, gradients = build(recipe, CONFIG, Ranks.of(layout, device), device)
    model.fill(lambda name, shape: initial_weight(name, shape, CONFIG, seed=0))
    step = partial(
        train_step, model, gradients, _batch(layout.rows_per_rank, recipe.sequence_length), lr=1e-4,
        micro_batch_rows=recipe.micro_batch_rows, max_grad_norm=recipe.optimizer.max_grad_norm,
    )  # fmt: skip
    weights = {id(weight): weight for weight in (*model.weights.values(), *model.stages[0].parameters())}  # and casts
    kept = [*weights.values(), *(tensor for kind in gradients.optimizer.state.values() for tensor in kind.values())]
    beyond = peak_bytes(lambda: [step(update=number) for number in (1, 2)])
    return sum(local_part(tensor).nbytes for tensor in kept) + beyond


def _batch(rows: int, length: int) -> Batch:
    """Rows of one document each, every token with a target."""
    tokens = np.random.default_rng(0).integers(3, 512, (rows, length))
    positions = np.tile(np.arange(length), (rows, 1))
    return Batch(tokens=tokens, targets=tokens, documents=np.zeros_like(tokens), positions=positions)
