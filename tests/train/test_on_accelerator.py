"""What an accelerator computes against what this machine's CPU computes: whole steps, the loss, the logits."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.model.llama import compile_layers
from puna.testing import tiny_model
from puna.train.loss import reference_cross_entropy, summed_cross_entropy
from puna.train.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
    pytest.mark.filterwarnings("ignore"),  # torch's compiler warns of torch's own modules
]

STEPS = 10


def accelerator() -> torch.device:
    """The device; a function, for asking at import would start it on machines that only list the tests."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device


@pytest.fixture
def losses(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., list[float]]:
    """A function that trains ten steps of a grouped-query model over packed documents, and gives their losses."""

    def train(name: str, **changes: Any) -> list[float]:
        folder = tmp_path / name
        puna.train(recipe(run_dir=str(folder), steps=STEPS, **changes))
        return [line["loss"] for line in read_metrics(folder)]

    return train


@pytest.fixture
def on_cpu(losses: Callable[..., list[float]]) -> list[float]:
    """The losses of the plain way: fp32 on the CPU."""
    return losses("cpu")


def test_ten_steps_in_fp32_are_those_of_the_cpu(losses: Callable[..., list[float]], on_cpu: list[float]) -> None:
    assert losses("device", device="auto") == pytest.approx(on_cpu, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compile": True},
        {"compile": True, "micro_batch_rows": 1},
        {"recompute": "block"},
        {"recompute": "offload"},
        {"recompute": "offload", "compile": True},
        {"recompute": "selective", "compile": True},
        {"precision": "bf16-pure"},
        {"optimizer": {"peak_lr": 1e-2, "state_bits": 8}},
        {"optimizer": {"peak_lr": 1e-2, "state_bits": 4}},
        {"optimizer": {"peak_lr": 1e-2, "in_backward": True}, "micro_batch_rows": 1},
        {"optimizer": {"peak_lr": 1e-2, "in_backward": True, "max_grad_norm": None}, "micro_batch_rows": 4},
    ],
    ids=str,
)
def test_every_way_of_training_in_bf16_learns_as_fp32_on_the_cpu_does(
    changes: dict[str, Any], losses: Callable[..., list[float]], on_cpu: list[float]
) -> None:
    found = losses("device", device="auto", **{"precision": "bf16", **changes})
    assert found == pytest.approx(on_cpu, rel=1e-2)
    assert found[-1] < found[0] - 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_is_the_plain_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 300, 64, generator=generator), torch.randn(1000, 64, generator=generator) / 8
    targets = torch.randint(0, 1000, (2, 300), generator=generator)
    targets[0, :50] = -100
    results = []
    for formula in (summed_cross_entropy, reference_cross_entropy):
        x = hidden.to(accelerator(), dtype).requires_grad_()
        weight = head.to(accelerator()).requires_grad_()
        options = {"chunk_logits": 1000 * 128} if formula is summed_cross_entropy else {}
        loss = formula(x, weight, targets.to(accelerator()), **options)
        results.append([loss, *torch.autograd.grad(loss, (x, weight))])
    for ours, expected in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert (ours.float() - expected.float()).norm() <= tolerance * expected.float().norm()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_logits_in_fp32_are_those_of_the_cpu(*, is_compiled: bool) -> None:
    model, tokens = tiny_model(num_key_value_heads=2), torch.arange(5, 37).view(2, 16)
    there = copy.deepcopy(model).to(accelerator())
    if is_compiled:
        compile_layers(there)
    with torch.no_grad():
        torch.testing.assert_close(there(tokens.to(accelerator())).cpu(), model(tokens), atol=1e-4, rtol=1e-4)
