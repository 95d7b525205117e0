"""The layouts of 34B that recipes name, built by one of 256 ranks on the meta device: its share is what plan counts."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from puna.config import load_recipe, recipe_names
from puna.model.config import PRESETS
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.parallel.model import DistributedModel
from puna.plan.case import Case
from puna.plan.memory import memory
from puna.plan.search import weights_of
from puna.train.optimizer import local_part

RECIPES = [name for name in recipe_names() if name.startswith("codellama-34b") and not name.endswith("1gpu")]


@pytest.fixture(scope="module", params=[0, 255])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """The first and the last of 256 ranks, in torch's fake group."""
    dist.init_process_group("fake", rank=request.param, world_size=256)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("name", RECIPES)
def test_a_rank_of_256_builds_its_share_of_34b(name: str, rank: int) -> None:
    recipe = load_recipe(name, {"parallel.dp_shard": "auto", "precision": "bf16"})
    config = PRESETS[recipe.model]
    layout = Layout.of(recipe, config, 256)
    model = DistributedModel.build(
        config, Ranks.of(layout, torch.device("cpu")), recipe.parallel, torch.device("meta"),
        dtype=torch.float32, compute_dtype=torch.bfloat16,
    )  # fmt: skip
    fullest = memory(Case(recipe, config, layout, weights_of(recipe, config)))
    share = sum(local_part(weight).nbytes for weight in model.weights.values())
    assert {weight.device.type for weight in model.weights.values()} == {"meta"}
    assert share == pytest.approx(fullest.rows["weights"], rel=0.01)
    assert share == pytest.approx(4 * config.parameter_count / 256, rel=0.02)  # the embedding is one stage's
