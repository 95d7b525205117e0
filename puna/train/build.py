"""What a recipe trains, as a layout shares it among ranks: the model, its optimizer and the place of its gradients."""

from functools import partial

import torch

from puna.config import Recipe
from puna.model.config import ModelConfig
from puna.model.recompute import prepare_layers
from puna.parallel.mesh import Ranks
from puna.parallel.model import DistributedModel
from puna.train.gradients import Gradients, gradients_of
from puna.train.optimizer import AdamW


def build(
    recipe: Recipe, config: ModelConfig, ranks: Ranks, device: torch.device
) -> tuple[DistributedModel, Gradients]:
    """What one rank holds of a recipe's model and its gradients, ready to train once the weights are filled.

    Args:
        recipe: its precision is settled, not "auto".
        config: shape of the whole model.
        ranks: who shares it.
        device: of this rank.

    Returns:
        The model and its gradients, with the optimizer that uses them as `gradients.optimizer`.

    Raises:
        UsageError: the pipeline's schedule needs another version of torch.
        PunaError: the optimizer's state of 8 or 4 bits cannot be sharded as the weights are.
    """
    model = DistributedModel.build(
        config, ranks, recipe.parallel, device,
        dtype=torch.bfloat16 if recipe.precision == "bf16-pure" else torch.float32,
        compute_dtype=None if recipe.precision == "fp32" else torch.bfloat16,
        prepare=partial(
            prepare_layers,
            recompute=recipe.recompute, n_recomputed=recipe.recompute_layers, is_compiled=recipe.compile,
        ),
    )  # fmt: skip
    settings = recipe.optimizer
    model.sums_replicas_once = not settings.in_backward
    gradients = gradients_of(
        AdamW(model.weights.items(), settings, seed=recipe.seed, bias_correction=recipe.arithmetic != "mindformers"),
        in_backward=settings.in_backward,
        is_clipped=settings.max_grad_norm is not None,
        micro_batches=ranks.layout.micro_batches,
    )
    return model, gradients
