"""Recomputation of the first layers alone: they compute twice, the others once, and gradients are the same."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor

from puna.model.recompute import prepare_layers
from puna.testing import tiny_model


def _step(recompute: str, n_recomputed: int | None) -> tuple[dict[str, Tensor], Counter[int]]:
    """Gradients, and how often each layer's MLP computed."""
    model, computed = copy.deepcopy(tiny_model(num_hidden_layers=3)), Counter[int]()
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: computed.update([number]))
    prepare_layers(model, recompute=recompute, is_compiled=False, n_recomputed=n_recomputed)
    model(torch.arange(16)[None]).float().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, computed


@pytest.mark.parametrize("mode", ["block", "selective", "offload"])
def test_the_first_layers_alone_compute_twice_and_gradients_are_the_same(mode: str) -> None:
    plain, once = _step("none", None)
    some, computed = _step(mode, 2)
    assert once == {0: 1, 1: 1, 2: 1}
    assert computed == {0: 2, 1: 2, 2: 1}
    for name, gradient in plain.items():
        assert torch.equal(gradient, some[name]), name
