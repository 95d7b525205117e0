"""What a layer under tensor parallelism is to the compiler; that its numbers are right `test_layouts` shows."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from puna.config import load_recipe
from puna.data.loader import Batch
from puna.model.config import preset
from puna.model.llama import initial_weight
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.train.build import build


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch's own modules
def test_the_graphs_of_a_compiled_layer_are_those_of_one_device_and_serve_all_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = _graphs_of_layers(1, monkeypatch)
    dist.init_process_group("fake", rank=0, world_size=2)
    try:
        shared = _graphs_of_layers(2, monkeypatch)
    finally:
        dist.destroy_process_group()
    assert len(shared) == len(alone)
    assert not any(isinstance(x, DTensor) for graph in shared for x in graph)


def _graphs_of_layers(tp: int, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The inputs of each graph that is compiled while twelve layers run forward and backward."""
    graphs: list[list[Tensor]] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(inputs)
        return graph.forward

    torch.compiler.reset()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", partial(torch.compile, backend=backend))
        content = {
            "model": "tiny-64", "data": {"train": "unused"}, "sequence_length": 64, "run_dir": "unused", "steps": 1,
            "batch_tokens": 64, "precision": "fp32", "device": "cpu", "compile": True, "parallel": {"tp": tp},
        }  # fmt: skip
        recipe, device = load_recipe(content), torch.device("cpu")
        config = replace(preset("tiny-64"), num_hidden_layers=12)
        model, _ = build(recipe, config, Ranks.of(Layout.of(recipe, config, tp), device), device)
        model.fill(lambda name, shape: initial_weight(name, shape, config, seed=0))
        row = np.zeros((1, 64), np.int64)
        batch = Batch(tokens=row, targets=row, positions=np.arange(64)[None], documents=row)
        model.forward_backward(batch, lambda hidden, *_: hidden.sum(), micro_batch_rows=1)
    return graphs
