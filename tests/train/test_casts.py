"""Layers that multiply with casts of their weights learn what those learn that cast them, to the last bit."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puna.config import Optimizer, Parallel
from puna.data.loader import Batch, stack
from puna.data.rows import Row
from puna.model.config import ModelConfig, preset
from puna.model.llama import initial_weight
from puna.model.recompute import prepare_layers
from puna.parallel.casts import Casts
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.parallel.model import DistributedModel
from puna.train.gradients import gradients_of
from puna.train.loss import IGNORE
from puna.train.optimizer import AdamW
from puna.train.step import summed_loss, train_step

CONFIG = preset("tiny-64")


def build(*, has_casts: bool, **options: Any) -> DistributedModel:
    def prepare(model: Any) -> list[nn.Module]:
        keeping = prepare_layers(model, **{"recompute": "none", "is_compiled": False, **options})
        return list(keeping) if has_casts else []

    config = ModelConfig.from_json({**CONFIG.to_json(), "attention_bias": True, "tie_word_embeddings": True})
    model = DistributedModel.build(
        config, Ranks(Layout(rows_per_rank=4, micro_batches=4), None, None, None), Parallel(), torch.device("cpu"),
        dtype=torch.float32, compute_dtype=torch.bfloat16, prepare=prepare,
    )  # fmt: skip
    model.fill(lambda name, shape: initial_weight(name, shape, config, seed=0))
    return model


def learn(model: DistributedModel, batch: Batch, **fields: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and norms of three steps and of a measurement after each, and the weights at the end."""
    settings = Optimizer(peak_lr=1e-2, **fields)
    optimizer = AdamW(model.weights.items(), settings, seed=0)
    gradients = gradients_of(
        optimizer, in_backward=settings.in_backward, is_clipped=settings.max_grad_norm is not None, micro_batches=4
    )
    numbers = []
    for update in (1, 2, 3):
        result = train_step(model, gradients, batch, update=update, lr=1e-2, micro_batch_rows=1, max_grad_norm=1.0)
        numbers += [result.loss, result.grad_norm, *summed_loss(model, batch, micro_batch_rows=4)]
    return numbers, {name: weight.detach().clone() for name, weight in model.weights.items()}


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, CONFIG.vocab_size, (4, 65), generator=generator).int().numpy()
    zeros, places = torch.zeros(64).int().numpy(), torch.arange(64).int().numpy()
    return stack(Row(row[:-1], row[1:], zeros, places) for row in tokens)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own modules
@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {}),
        ({}, {"in_backward": True}),
        ({}, {"in_backward": True, "state_bits": 8}),
        ({"recompute": "block", "n_recomputed": 1}, {}),
        ({"is_compiled": True}, {}),
    ],
    ids=str,
)
def test_steps_are_those_of_a_network_that_casts(batch, options, fields):
    numbers, weights = learn(build(has_casts=True, **options), batch, **fields)
    expected_numbers, expected = learn(build(has_casts=False, **options), batch, **fields)
    assert numbers == expected_numbers
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, expected[name]), name


def test_gradients_are_those_of_fp32_but_for_rounding_that_goes_both_ways(batch):
    batch.targets[0, :3] = IGNORE  # in bf16, 1 / 253 is 0.37 % too large
    found, expected = (build(has_casts=False), build(has_casts=False))
    expected.stages[0].llama.compute_dtype = torch.float32
    norms = []
    for model in (found, expected):
        gradients = gradients_of(
            AdamW(model.weights.items(), Optimizer(), seed=0), in_backward=False, is_clipped=True, micro_batches=4
        )
        result = train_step(model, gradients, batch, update=1, lr=0, micro_batch_rows=1, max_grad_norm=1.0)
        norms.append(result.grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_layers_that_recompute_have_none():
    first, *rest = build(has_casts=True, recompute="block", n_recomputed=1).stages[0].llama.model.layers
    assert {weight.dtype for weight in first.parameters()} == {torch.float32}
    assert all(layer.mlp.up_proj.weight.dtype == torch.bfloat16 for layer in rest)
    assert rest


def test_hooks_of_originals_are_called_for_every_gradient():
    layer = nn.Linear(4, 3, bias=False)
    original, seen = layer.weight, []
    original.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    casts = Casts([layer], torch.bfloat16)
    casts.refresh()
    for scale in (1.0, 2.0):
        (layer(torch.full((2, 4), scale, dtype=torch.bfloat16)).sum()).backward()
    assert layer.weight is not original
    assert layer.weight.grad is None
    assert [grad.unique().tolist() for grad in seen] == [[2.0], [6.0]]


@pytest.mark.parametrize(("layout", "dtype"), [(Layout(), torch.bfloat16), (Layout(micro_batches=4), None)])
def test_there_are_none_where_nothing_is_spared(layout, dtype):
    model = DistributedModel.build(
        CONFIG, Ranks(layout, None, None, None), Parallel(), torch.device("cpu"), dtype=torch.float32,
        compute_dtype=dtype, prepare=partial(prepare_layers, recompute="none", is_compiled=False),
    )  # fmt: skip
    assert {weight.dtype for weight in model.stages[0].parameters()} == {torch.float32}
