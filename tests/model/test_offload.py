"""Offload: what recomputation keeps goes to the host and comes back, and nothing else changes."""

import copy

import pytest
import torch
from torch import Tensor

from puna.model.offload import Offload
from puna.model.recompute import prepare_layers
from puna.testing import tiny_model


def _gradients(recompute: str, device: torch.device) -> dict[str, Tensor]:
    model = copy.deepcopy(tiny_model()).to(device)
    prepare_layers(model, recompute=recompute, is_compiled=False)
    for tokens in (torch.arange(16)[None], torch.arange(40, 56)[None]):  # two micro-batches
        model(tokens.to(device)).float().square().mean().backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_a_model_that_keeps_everything() -> None:
    plain, offloaded = (_gradients(mode, torch.device("cpu")) for mode in ("none", "offload"))
    for name, gradient in plain.items():
        assert torch.equal(gradient, offloaded[name]), name


def test_the_input_of_every_layer_and_nothing_else_goes_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    to_host = Offload._to_host

    def noted(self: Offload, x: Tensor) -> object:
        kept = to_host(self, x)
        if kept is not x:
            sent.append(x)
        return kept

    monkeypatch.setattr(Offload, "_to_host", noted)
    model = tiny_model()
    prepare_layers(model, recompute="offload", is_compiled=False)
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(torch.arange(16)[None]).sum().backward()
    assert len(sent) == len(model.model.layers)
    assert all(torch.equal(one, other) for one, other in zip(sent, inputs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_on_an_accelerator_nothing_but_one_layers_input_stays() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    plain, offloaded = (_gradients(mode, device) for mode in ("block", "offload"))
    for name, gradient in plain.items():
        assert torch.equal(gradient, offloaded[name]), name
    x = torch.ones(1 << 22, device=device, requires_grad=True)
    offload, before = Offload(), torch.accelerator.memory_allocated(device)
    with offload.keeping():
        y = x
        for _ in range(8):
            y = (y * 1.5).sin()  # keeps its input
    assert torch.accelerator.memory_allocated(device) - before <= 5 * x.nbytes  # the result and what is on its way
    y.sum().backward()
    expected = torch.ones(1 << 22, device=device, requires_grad=True)
    y = expected
    for _ in range(8):
        y = (y * 1.5).sin()
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=0, atol=0)
