"""The learning rate is a pure function of the update's number."""

import json
from pathlib import Path

import pytest

from puna.config import Schedule
from puna.train.schedule import learning_rate


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_peak_comes_with_the_last_warmup_update_and_the_floor_with_the_last(name: str) -> None:
    schedule = Schedule(name=name, warmup_steps=10, final_fraction=0.1)
    rates = [learning_rate(n, schedule, peak_lr=2.0, steps=100) for n in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == max(rates) == 2.0
    assert rates[-1] == pytest.approx(2.0 if name == "constant" else 0.2)
    assert sorted(rates[9:], reverse=True) == rates[9:]


def test_linear_is_halfway_at_half_time() -> None:
    schedule = Schedule(name="linear", final_fraction=0.0)
    assert learning_rate(50, schedule, peak_lr=1.0, steps=100) == pytest.approx(0.5)


def test_cosine_equals_the_values_that_mindformers_printed(shared: Path) -> None:
    for case in json.loads((shared / "fixtures/mindspore/reference/lr_cosine_warmup.json").read_text()):
        args = case["args"]
        if args["total_steps"] < 0 or args["lr_end"] != 0:
            continue
        schedule = Schedule(warmup_steps=int(args["warmup_ratio"] * args["total_steps"]), final_fraction=0.0)
        for step, expected in zip(case["step"], case["lr"], strict=True):
            ours = learning_rate(step, schedule, peak_lr=args["learning_rate"], steps=args["total_steps"])
            assert ours == pytest.approx(expected, rel=2e-4, abs=1e-12), step
