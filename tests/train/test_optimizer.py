"""AdamW against torch's own; stochastic rounding against its expectation."""

import pytest
import torch

from puna.config import Optimizer
from puna.train import optimizer as optimizer_module
from puna.train.optimizer import AdamW, round_stochastically


def _parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {
        "matrix": torch.nn.Parameter(torch.randn(7, 5).to(dtype)),
        "norm": torch.nn.Parameter(torch.ones(5).to(dtype)),
    }


def test_ten_steps_equal_torchs_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optimizer_module.PIECE, "cpu", 8)  # several pieces a tensor
    ours, theirs = _parameters(), _parameters()
    settings = Optimizer(weight_decay=0.1)
    adamw = AdamW(ours.items(), settings, seed=0)
    groups = [
        {"params": [theirs["matrix"]], "weight_decay": 0.1},
        {"params": [theirs["norm"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=settings.betas, eps=settings.eps)
    for update in range(1, 11):
        for name in ours:
            ours[name].grad = torch.randn(ours[name].shape, generator=torch.Generator().manual_seed(update))
            theirs[name].grad = ours[name].grad.clone() * 0.5
        adamw.step(update, 1e-2, grad_scale=0.5)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_stochastic_rounding_is_right_on_average_and_gives_a_neighbour() -> None:
    x = torch.full((200_000,), 1.0 + 0.3 * 2**-7)  # bf16 neighbours of it: 1 and 1 + 2^-7
    rounded = round_stochastically(x, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(x[0].item(), abs=5 * 2**-7 * (0.21 / 200_000) ** 0.5)


def test_stochastic_rounding_keeps_what_is_exact_or_not_finite() -> None:
    x = torch.tensor([0.0, 1.5, -2.0, float("inf"), float("-inf"), float("nan")])
    rounded = round_stochastically(x, torch.Generator().manual_seed(0)).float()
    assert torch.equal(rounded[:5], x[:5])
    assert rounded[5].isnan()


def test_updates_too_small_for_bf16_still_move_the_weights() -> None:
    parameters = {"w": torch.nn.Parameter(torch.ones(4096, 2, dtype=torch.bfloat16))}
    adamw = AdamW(parameters.items(), Optimizer(weight_decay=0.0), seed=0)
    for update in range(1, 51):
        parameters["w"].grad = torch.ones_like(parameters["w"])
        adamw.step(update, 1e-4)  # a 78th of the distance between bf16 numbers below 1 and 26 times that at most
    assert parameters["w"].float().mean().item() == pytest.approx(1 - 50 * 1e-4, abs=2e-4)


def test_the_random_bits_are_a_function_of_seed_and_update() -> None:
    results = []
    for seed in (0, 0, 1):
        parameters = _parameters(torch.bfloat16)
        adamw = AdamW(parameters.items(), Optimizer(), seed=seed)
        parameters["matrix"].grad = torch.ones_like(parameters["matrix"])
        adamw.step(3, 1e-3)
        results.append(parameters["matrix"].detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
