"""Processor time that a layer takes its host under a layout, beside one device and beside torch's own parallel styles.

    python benchmarks/host.py

A device as fast as a GPU waits for its host where operations are handed to it too slowly. Here layers are so small (64
wide, a row of 64 tokens) that handing out is most of what they take, and exchanges are pretended (torch's fake group):
one process is measured, as rank 0 of four. A layer's time, forward and backward, is that of twelve layers less that of
two, a tenth of it. torch's parallel styles are used as torchtitan uses them: sequence-parallel norms, column- and
row-wise matrices. Contenders take turns; the median of their rounds counts. Numbers are right by the tests, not here.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from record import arguments, record
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from puna.config import Parallel
from puna.data.loader import Batch
from puna.model.config import ModelConfig, preset
from puna.model.llama import Llama, init_weights, initial_weight
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.parallel.model import DistributedModel

RANKS, TOKENS, FEW, MANY, WARM_UP, STEPS = 4, 64, 2, 12, 10, 20
ALONE, SHARED, STYLES = "puna, one device", "puna, tp 4", "torch's parallel styles, tp 4"
LAYOUTS = {
    ALONE: Layout(), SHARED: Layout(tp=4), "puna, dp_shard 4": Layout(dp_shard=4),
    "puna, dp_shard 2 x tp 2": Layout(dp_shard=2, tp=2),
}  # fmt: skip
#: puna's time under tp beside one device's and beside torch's way, at most.
GOALS = {"of_one_device": 2.5, "of_the_peer": 0.5}
CPU = torch.device("cpu")


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = arguments(parser)
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=RANKS)
    steps = {name: {layers: _step(name, layers) for layers in (FEW, MANY)} for name in [*LAYOUTS, STYLES]}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, of in steps.items():
            few, many = (statistics.median(of[layers]() for _ in range(STEPS)) for layers in (FEW, MANY))
            seconds[name].append((many - few) / (MANY - FEW))
    dist.destroy_process_group()
    rows = [{"contender": name, "milliseconds_a_layer": 1e3 * statistics.median(taken), "seconds": taken}
            for name, taken in seconds.items()]  # fmt: skip
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratios = {"of_one_device": median[SHARED] / median[ALONE], "of_the_peer": median[SHARED] / median[STYLES]}
    record("host", rows, {**ratios, "goals": GOALS,
                          "missed": ", ".join(name for name in GOALS if ratios[name] > GOALS[name])})  # fmt: skip


def _step(name: str, layers: int) -> Callable[[], float]:
    """A function that runs a model forward and backward, and returns the processor seconds that it took."""
    config = replace(preset("tiny-64"), num_hidden_layers=layers, num_key_value_heads=4)
    model = _model_by_styles(config) if name == STYLES else _model(LAYOUTS[name], config)
    row = np.zeros((1, TOKENS), np.int64)
    batch = Batch(tokens=row, targets=row, positions=np.arange(TOKENS)[None], documents=row)

    def step() -> float:
        for weight in model.weights.values():
            weight.grad = None
        start = time.process_time()
        model.forward_backward(batch, lambda hidden, *_: hidden.sum(), micro_batch_rows=1)
        return time.process_time() - start

    for _ in range(WARM_UP):
        step()
    return step


def _model(layout: Layout, config: ModelConfig) -> DistributedModel:
    ranks = Ranks(layout, None, None, None) if layout.devices == 1 else Ranks.of(layout, CPU)
    model = DistributedModel.build(config, ranks, Parallel(), CPU, dtype=torch.float32)
    model.fill(lambda name, shape: initial_weight(name, shape, config, seed=0))
    return model


def _model_by_styles(config: ModelConfig) -> DistributedModel:
    llama = Llama(config)
    init_weights(llama, seed=0)
    styles = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(use_local_output=True),
    }
    for number in range(config.num_hidden_layers):
        layer, others = f"model.layers.{number}", (None,) * 4
        styles |= {f"{layer}.{name}": SequenceParallel(use_local_output=True)
                   for name in ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
        styles |= {f"{layer}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        styles |= {f"{layer}.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        styles |= {f"{layer}.{name}_proj": RowwiseParallel(output_layouts=Shard(1))
                   for name in ("self_attn.o", "mlp.down")}  # fmt: skip
        styles[f"{layer}.self_attn"] = PrepareModuleInput(
            input_layouts=(Shard(1), *others), desired_input_layouts=(Replicate(), *others)
        )
        styles[f"{layer}.mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    parallelize_module(llama, init_device_mesh("cpu", (RANKS,)), styles)
    return DistributedModel.alone(llama)


if __name__ == "__main__":
    main()
