"""Takes the same ten steps under several layouts; started by torchrun, once for all layouts of so many processes.

    python -m torch.distributed.run --nproc-per-node 4 layouts.py recipe.json layouts.json results.json

`recipe.json` is a recipe's content, `layouts.json` maps a name to overrides, of the model too. Rank 0 writes, for each
name, the losses, gradient norms, the loss of a batch that is only measured, and a fingerprint of the rows that all
ranks read. Here `fully_shard` moves what it is given, as it does on accelerators alone.
"""

import contextlib
import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_state
from torch.utils._pytree import tree_map_only

from puna.config import load_recipe
from puna.data.loader import Batch
from puna.model.config import ModelConfig, preset
from puna.model.llama import initial_weight
from puna.parallel.collectives import all_sum
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks, is_first_rank, process_group
from puna.parallel.model import DistributedModel
from puna.train.build import build
from puna.train.gradients import Gradients
from puna.train.inputs import open_loader
from puna.train.loss import IGNORE
from puna.train.optimizer import local_part
from puna.train.schedule import learning_rate
from puna.train.step import summed_loss, train_step

STEPS = 10

#: Grouped-query attention, and layers enough for four stages.
CONFIG = replace(preset("tiny-64"), num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=8)


def steps_of(content: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The numbers of ten steps, on as many ranks as there are."""
    changes = {name: value for name, value in overrides.items() if name in ModelConfig.__dataclass_fields__}
    recipe = load_recipe(content, {name: value for name, value in overrides.items() if name not in changes})
    config, device = replace(CONFIG, **changes), torch.device("cpu")
    layout = Layout.of(recipe, config, dist.get_world_size() if dist.is_initialized() else 1)
    ranks = Ranks.of(layout, device)
    model, gradients = build(recipe, config, ranks, device)
    model.fill(lambda name, shape: initial_weight(name, shape, config, seed=recipe.seed))
    loader = open_loader(recipe)
    numbers: dict[str, Any] = {"loss": [], "grad_norm": [], "n_targets": []}
    read = []
    for step in range(STEPS):
        batch = loader.batch(step, rank=ranks.dp_rank, world_size=layout.dp_size)
        lr = learning_rate(step + 1, recipe.schedule, peak_lr=recipe.optimizer.peak_lr, steps=STEPS)
        result = train_step(
            model, gradients, batch, update=step + 1, lr=lr,
            micro_batch_rows=recipe.micro_batch_rows, max_grad_norm=recipe.optimizer.max_grad_norm,
        )  # fmt: skip
        for name in numbers:
            numbers[name].append(getattr(result, name))
        read.append([hashlib.sha256(row.tobytes()).hexdigest() for row in batch.tokens])
    batch = loader.batch(STEPS, rank=ranks.dp_rank, world_size=layout.dp_size)
    loss, n_targets = summed_loss(model, batch, micro_batch_rows=recipe.micro_batch_rows)
    numbers["measured"] = loss / n_targets
    numbers["moved_without_targets"] = _moves_without_targets(model, gradients, batch, recipe.micro_batch_rows)
    numbers["rows"] = _rows_of_all(ranks, read)
    return numbers


def _moves_without_targets(model: DistributedModel, gradients: Gradients, batch: Batch, micro_batch_rows: int) -> float:
    """On how many ranks a step over rows that ask for nothing changes a weight or a state."""
    optimizer = gradients.optimizer
    tensors = [optimizer.parameters, *optimizer.state.values()]
    before = [local_part(tensor.detach()).clone() for kind in tensors for tensor in kind.values()]
    blank = replace(batch, targets=np.full_like(batch.targets, IGNORE))
    result = train_step(
        model, gradients, blank, update=STEPS + 1, lr=1e-2, micro_batch_rows=micro_batch_rows, max_grad_norm=None
    )
    assert (result.n_targets, result.is_applied) == (0, False)
    after = [local_part(tensor.detach()) for kind in tensors for tensor in kind.values()]
    return all_sum(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))[0]


def _rows_of_all(ranks: Ranks, read: list[list[str]]) -> list[list[str]]:
    """The rows of each step's global batch, in order, as the ranks read them."""
    if not dist.is_initialized():
        return read
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (ranks.dp_rank, read))
    by_share = dict(sorted(gathered))
    assert all(rows == by_share[share] for share, rows in gathered)
    return [[row for share in by_share.values() for row in share[step]] for step in range(len(read))]


@contextlib.contextmanager
def moved_inputs() -> Iterator[None]:
    """Has `fully_shard` move a stage's tensors to the device; where they are then, no NumPy sees them."""
    moved: dict[int, Tensor] = {}
    plain = Tensor.numpy

    def move(x: Tensor) -> Tensor:
        there = x.clone()
        return moved.setdefault(id(there), there)

    def numpy(x: Tensor, **options: Any) -> Any:
        assert id(x) not in moved, "it is on the device"
        return plain(x, **options)

    def all_moved(arguments: Any, named: Any, *_: object) -> tuple[Any, Any]:
        return (tree_map_only(Tensor, move, arguments),), (tree_map_only(Tensor, move, named),)

    begin = _fsdp_state.FSDPState._root_pre_forward

    def begin_on_a_device(state: Any, *arguments: Any) -> Any:
        state._lazy_init()
        with patch.object(torch._C, "_get_privateuse1_backend_name", lambda: "cpu"):  # a device of any name
            return begin(state, *arguments)

    with (
        patch.object(_fsdp_state.FSDPState, "_root_pre_forward", begin_on_a_device),
        patch.object(_fsdp_state, "_to_kwargs", all_moved),
        patch.object(Tensor, "numpy", numpy),
    ):
        yield


def main() -> None:
    """Runs every layout and writes what came out."""
    recipe, layouts, results = sys.argv[1:]
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")), moved_inputs():
        content = json.loads(Path(recipe).read_text())
        numbers = {}
        for name, change in json.loads(Path(layouts).read_text()).items():
            with warnings.catch_warnings():
                if change.get("compile"):
                    warnings.simplefilter("ignore")  # torch's compiler warns of torch's own modules
                    torch.compiler.reset()  # it compiles a function for so many shapes, and no more
                numbers[name] = steps_of(content, change)
        if is_first_rank():
            Path(results).write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
