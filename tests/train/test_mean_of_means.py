"""The mean of micro-batches' means, as MindFormers takes it, beside the mean over all targets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from puna.config import Optimizer, load_recipe
from puna.data.loader import Batch
from puna.errors import UsageError
from puna.parallel.model import DistributedModel
from puna.testing import tiny_model
from puna.train.gradients import Gradients
from puna.train.loss import IGNORE
from puna.train.optimizer import AdamW
from puna.train.step import train_step


def _batch() -> Batch:
    """Four rows, of which the first has 2 targets, the last none."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, 512, (4, 12)).astype(np.int32)
    targets = np.roll(tokens, -1, 1)
    targets[:, -1] = IGNORE
    targets[0, 2:] = IGNORE
    targets[3] = IGNORE
    return Batch(tokens, targets, np.zeros_like(tokens), np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape))


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_each_micro_batch_counts_alike_however_many_targets_it_has(micro_batch_rows):
    batch, model = _batch(), DistributedModel.alone(tiny_model())
    with torch.no_grad():
        logits = tiny_model()(torch.from_numpy(batch.tokens).long())
    wanted = torch.from_numpy(batch.targets).long()
    means = []
    for start in range(0, 4, micro_batch_rows):
        rows = slice(start, start + micro_batch_rows)
        total = F.cross_entropy(
            logits[rows].flatten(0, 1), wanted[rows].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        means.append(total / max(1, int((wanted[rows] != IGNORE).sum())))
    optimizer = AdamW(model.weights.items(), Optimizer(), seed=0)
    result = train_step(
        model, Gradients(optimizer), batch, update=1, lr=1e-3, micro_batch_rows=micro_batch_rows, max_grad_norm=1.0,
        is_mean_of_means=True,
    )  # fmt: skip
    assert result.loss == pytest.approx(float(torch.stack(means).mean()), rel=1e-5)
    whole = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE)
    assert (abs(result.loss - float(whole)) < 1e-4) == (micro_batch_rows == 4)


def test_it_takes_whole_rows():
    with pytest.raises(UsageError, match=r"takes the mean of whole rows; use parallel\.cp=1"):
        load_recipe("tiny-pretrain", {"arithmetic": "mindformers", "parallel.cp": 2, "data.train": "x"})
