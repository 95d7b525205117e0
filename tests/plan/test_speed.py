"""What a plan says of pipelines' time, against the order in which torch's schedules run and what a step gathers."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.pipelining.schedules import _ComputationType

from puna.config import load_recipe
from puna.devices import PROFILES
from puna.model.config import PRESETS
from puna.model.llama import initial_weight
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.parallel.pipeline import SCHEDULES
from puna.plan.case import Case
from puna.plan.search import Search, weights_of
from puna.plan.speed import Cluster, exposed_sends, idle_seconds
from puna.train.build import build
from puna.train.step import train_step
from tests.plan.test_memory import CONFIG, _batch, _fake_group, _recipe

#: Name of a schedule -> stages of a rank.
STAGES = {"1f1b": (1,), "interleaved": (2, 3, 4), "zero-bubble": (2, 3)}
SIZES = [(name, pp, n) for name, several in STAGES.items() for pp in (2, 4, 8) for n in several]


class Work(NamedTuple):
    """One pass of a micro-batch through a stage: "F" forward, "B" backward, "W" of the weights alone."""

    kind: str
    stage: int
    micro_batch: int


@pytest.mark.parametrize("head", [0.0, 1.1, 3.0])
@pytest.mark.parametrize(("schedule", "pp", "stages_per_rank"), SIZES)
def test_idle_time_is_that_of_torchs_schedules(schedule: str, pp: int, stages_per_rank: int, head: float) -> None:
    stages = [2.0] * (pp * stages_per_rank)
    stages[-1] += head
    for rounds in (1, 2, 5):
        slowest, idle = idle_seconds(stages, pp, schedule)
        busy = pp * rounds * sum(stages[slowest::pp])
        assert _step(schedule, pp, stages, pp * rounds) == pytest.approx(busy + idle)


@pytest.mark.parametrize("layers", [32, 48, 80])
@pytest.mark.parametrize(("schedule", "pp", "stages_per_rank"), SIZES)
def test_layers_that_do_not_divide_idle_about_as_long(
    schedule: str, pp: int, stages_per_rank: int, layers: int
) -> None:
    layout = Layout(pp=pp, stages_per_rank=stages_per_rank)
    stages = [float(len(each)) for each in layout.stage_layers(layers)]
    for rounds in (1, 4):
        slowest, idle = idle_seconds(stages, pp, schedule)
        busy = pp * rounds * sum(stages[slowest::pp])
        assert _step(schedule, pp, stages, pp * rounds) == pytest.approx(busy + idle, rel=0.2)


@pytest.mark.parametrize(("schedule", "pp", "stages_per_rank"), SIZES)
def test_a_step_waits_for_as_many_transfers_as_torchs_schedules(schedule: str, pp: int, stages_per_rank: int) -> None:
    stages, seconds = [3.0] * (pp * stages_per_rank), 0.01
    for rounds in (1, 2, 5):
        layout = Layout(pp=pp, stages_per_rank=stages_per_rank, micro_batches=pp * rounds)
        steps = [_step(schedule, pp, stages, pp * rounds, sending=sending) for sending in (0.0, seconds)]
        waits = (steps[1] - steps[0]) / seconds
        tolerance = 0.7 if schedule == "zero-bubble" else 1e-6  # whose gradients of weights hide some
        assert exposed_sends(layout) == pytest.approx(waits, rel=tolerance)


@pytest.mark.parametrize(
    ("devices", "parallel"),
    [
        (2, {}),
        (2, {"reshard": False}),
        (4, {"pp": 2}),
        (4, {"pp": 2, "reshard": False}),
        (4, {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2}),
    ],
)
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_a_step_gathers_and_sums_as_often_as_is_planned(
    devices: int, parallel: dict[str, Any], micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "recv", lambda tensor, **_: tensor.fill_(1))  # whether a stage knows what it sends: yes
    recipe = _recipe({**parallel, "batch_tokens": 2 * micro_batches * 256})
    layout = Layout.of(recipe, CONFIG, devices)
    case = Case(recipe, CONFIG, layout, weights_of(recipe, CONFIG), is_cpu=True)
    with _fake_group(rank=0, size=devices):
        device = torch.device("cpu")
        model, gradients = build(recipe, CONFIG, Ranks.of(layout, device), device)
        model.fill(lambda name, shape: initial_weight(name, shape, CONFIG, seed=0))
        step = partial(
            train_step, model, gradients, _batch(layout.rows_per_rank, 256), lr=1e-4, micro_batch_rows=1,
            max_grad_norm=None,
        )  # fmt: skip
        step(update=1)
        with _counted(monkeypatch, "foreach_all_gather", "foreach_reduce") as counted:
            step(update=2)
    layers, outside = case.most_layers, 1  # weights outside layers stay whole from one pass to the other
    assert counted["foreach_all_gather"] == layers * case.gathers + outside * case.sums
    assert counted["foreach_reduce"] == (layers + outside) * case.sums


def test_the_head_is_the_last_stages_which_has_fewer_layers() -> None:
    """Of 80 layers on 32 ranks 16 have three; the last has two and the head, which is less than a third one."""
    recipe = load_recipe(
        "codellama-70b-pretrain",
        {
            "parallel.pp": 32, "parallel.tp": 1, "batch_tokens": 64 * 4096, "micro_batch_rows": 1,
            "recompute": "none", "recompute_layers": None,
        },
    )  # fmt: skip
    search = Search(recipe, PRESETS["codellama-70b"], Cluster(PROFILES["h100"]), 32, 10_000)
    rows = search.judge(recipe).speed.rows
    config = search.config
    of_layers = (config.matmul_parameter_count - config.vocab_size * config.hidden_size) / 80  # weights
    head = config.vocab_size * config.hidden_size
    assert head < of_layers
    rate = 989e12 * PROFILES["h100"].matmul_share * 4096 / (4096 + 256)
    assert rows["products"] == pytest.approx(64 * 4096 * 6 * 3 * of_layers / rate)


def _step(schedule: str, pp: int, stages: list[float], micro_batches: int, *, sending: float = 0.0) -> float:
    """Seconds of a step in which every rank works in torch's order, and begins as soon as what it needs is there."""
    shares = {"F": 1 / 3, "B": 1 / 3 if schedule == "zero-bubble" else 2 / 3, "W": 1 / 3}
    left = _order(schedule, pp, len(stages) // pp, micro_batches)
    done: dict[Work, float] = {}
    clocks = [0.0] * pp
    while any(left):
        for rank, works in enumerate(left):
            while works and all(need in done for need in _needs(works[0], len(stages))):
                work = works.pop(0)
                arrivals = [done[need] + sending * (need.stage != work.stage) for need in _needs(work, len(stages))]
                clocks[rank] = max(clocks[rank], *arrivals, 0.0) + shares[work.kind] * stages[work.stage]
                done[work] = clocks[rank]
    return max(clocks)


def _needs(work: Work, n_stages: int) -> Iterator[Work]:
    kind, stage, micro_batch = work
    if kind == "F" and stage > 0:
        yield Work("F", stage - 1, micro_batch)
    if kind == "B":
        yield Work("F", stage, micro_batch)
        if stage < n_stages - 1:
            yield Work("B", stage + 1, micro_batch)
    if kind == "W":
        yield Work("B", stage, micro_batch)


def _order(schedule: str, pp: int, stages_per_rank: int, micro_batches: int) -> list[list[Work]]:
    """What each rank of torch's schedule does, one after another."""
    if schedule == "1f1b":
        return [_order_of_1f1b(rank, pp, micro_batches) for rank in range(pp)]
    stages = [MagicMock(stage_index=i * pp, num_stages=pp * stages_per_rank, group_size=pp, group_rank=0,
                        submod=None, device=torch.device("cpu")) for i in range(stages_per_rank)]  # fmt: skip
    actions = SCHEDULES[schedule][0](stages, micro_batches, loss_fn=lambda *_: None).pipeline_order
    kinds = {
        _ComputationType.FORWARD: "F", _ComputationType.FULL_BACKWARD: "B", _ComputationType.BACKWARD_INPUT: "B",
        _ComputationType.BACKWARD_WEIGHT: "W",
    }  # fmt: skip
    return [
        [Work(kinds[each.computation_type], each.stage_index, each.microbatch_index) for each in actions[rank] if each]
        for rank in range(pp)
    ]


def _order_of_1f1b(rank: int, pp: int, micro_batches: int) -> list[Work]:
    """As a stage is called that sends nothing."""
    done: list[Work] = []
    stage = MagicMock(stage_index=rank, num_stages=pp, is_last=False, device=torch.device("cpu"))
    for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stage, name).return_value = []
    stage.forward_one_chunk.side_effect = lambda number, *_, **__: done.append(Work("F", rank, number))
    stage.backward_one_chunk.side_effect = lambda number, **_: done.append(Work("B", rank, number))
    schedule = Schedule1F1B(stage, micro_batches, loss_fn=lambda *_: None, scale_grads=False)
    schedule._step_microbatches([()] * micro_batches, [{}] * micro_batches)
    return done


@contextlib.contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[Counter[str]]:
    """How often `fully_shard` calls its functions of these names."""
    counter: Counter[str] = Counter()

    def count(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        counter[name] += 1
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(_fsdp_param_group, name, partial(count, name, getattr(_fsdp_param_group, name)))
        yield counter
