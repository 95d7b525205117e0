"""Processor time that a layer under tensor parallelism takes its host, beside one device and beside torch's own way.

    python benchmarks/host.py

A device as fast as a GPU waits for its host where operations are handed to it too slowly. Here layers are so small (64
wide, a row of 64 tokens) that handing out is most of what they take, and exchanges are pretended (torch's fake group):
one process is measured, as rank 0 of two. A layer's time is that of twelve layers less that of two, a tenth of it,
forward and backward. torch's way is its parallel styles, as torchtitan uses them: sequence-parallel norms, column- and
row-wise matrices. Contenders take turns; the median of their rounds counts. Numbers are right by the tests, not here.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from record import arguments, record
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from puna.model.config import preset
from puna.model.llama import Llama, init_weights
from puna.parallel.tensor import split_weights

TOKENS, FEW, MANY, WARM_UP, STEPS = 64, 2, 12, 10, 20
ALONE, SHARED, STYLES = "puna, one device", "puna, tp 2", "torch's parallel styles, tp 2"
#: puna's host time a layer under tp beside one device's, at most, and beside torch's way.
GOALS = {"of_one_device": 2.5, "of_the_peer": 0.5}


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = arguments(parser)
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    ways: dict[str, Callable[[Llama, DeviceMesh], None]] = {
        ALONE: lambda model, mesh: None, SHARED: split_weights, STYLES: _use_styles,
    }  # fmt: skip
    steps = {(name, layers): _step(way, mesh, layers) for name, way in ways.items() for layers in (FEW, MANY)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name in ways:
            few, many = (statistics.median(steps[name, layers]() for _ in range(STEPS)) for layers in (FEW, MANY))
            seconds[name].append((many - few) / (MANY - FEW))
    dist.destroy_process_group()
    rows = [{"contender": name, "milliseconds_a_layer": 1e3 * statistics.median(taken), "seconds": taken}
            for name, taken in seconds.items()]  # fmt: skip
    of = {row["contender"]: row["milliseconds_a_layer"] for row in rows}
    ratios = {"of_one_device": of[SHARED] / of[ALONE], "of_the_peer": of[SHARED] / of[STYLES]}
    record("host", rows, {**ratios, "goals": GOALS,
                          "missed": ", ".join(name for name in GOALS if ratios[name] > GOALS[name])})  # fmt: skip


def _step(way: Callable[[Llama, DeviceMesh], None], mesh: DeviceMesh, layers: int) -> Callable[[], float]:
    """A function that runs a model forward and backward, and returns the processor seconds that it took."""
    model = Llama(replace(preset("tiny-64"), num_hidden_layers=layers, num_key_value_heads=4))
    init_weights(model, seed=0)
    way(model, mesh)
    tokens = torch.arange(TOKENS)[None]

    def step() -> float:
        model.zero_grad()
        start = time.process_time()
        model.hidden(tokens).sum().backward()
        return time.process_time() - start

    for _ in range(WARM_UP):
        step()
    return step


def _use_styles(model: Llama, mesh: DeviceMesh) -> None:
    """Splits a model by torch's styles."""
    styles = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(use_local_output=True),
    }
    for number in range(len(model.model.layers)):
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
    parallelize_module(model, mesh, styles)


if __name__ == "__main__":
    main()
