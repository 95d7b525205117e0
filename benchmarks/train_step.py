"""Training steps side by side: puna's and transformers' LlamaForCausalLM with torch's fused AdamW.

    python benchmarks/train_step.py [--steps 5] [--precision bf16|fp32|auto] [--vocab 32000] [--micro-batch-rows 1]

Both train the same model (8 layers x 512, rows of 1,024, random tokens, same start) in one process, in turn, step by
step: what slows the machine down slows both. Each runs eager and compiled; the better median counts. Losses must agree.
Freed memory is kept for both and lies in large pages, as `puna train` does for itself. With micro-batches both sum the
gradients of all before they use them, and the result is a record of its own.
On a CPU without bf16 units (AVX2), bf16 products are some hundred times slower than fp32 ones, so `auto` measures fp32
there and says so in the result.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # both as under the command line, and before torch is loaded
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from random_rows import random_batch
from record import arguments, record
from turns import in_turn

from puna import devices
from puna.config import Optimizer, Parallel
from puna.data.loader import Batch
from puna.model.config import ModelConfig, preset
from puna.model.flops import flops_per_token
from puna.model.llama import Llama, init_weights, initial_weight
from puna.model.recompute import prepare_layers
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.parallel.model import DistributedModel
from puna.train.gradients import Gradients
from puna.train.optimizer import AdamW
from puna.train.step import train_step

LR = 1e-4


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--micro-batch-rows", type=int, help="rows that go through at once (default: all)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    args = arguments(parser)
    device = devices.pick_device()
    devices.keep_freed_memory()
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if devices.has_fast_bf16(device) else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    config = replace(preset("tiny-512"), vocab_size=args.vocab)
    batch = random_batch(args.rows, args.length, args.vocab)
    at_once = args.micro_batch_rows or args.rows
    contenders: dict[str, Callable[[int], float]] = {}
    for is_compiled in (False, True):
        how = "compiled" if is_compiled else "eager"
        layout = Layout(rows_per_rank=args.rows, micro_batches=args.rows // at_once)
        contenders[f"puna, {how}"] = puna_step(config, batch, dtype, device, is_compiled=is_compiled, layout=layout)
        contenders[f"transformers, {how}"] = transformers_step(
            config, batch, at_once, dtype, device, is_compiled=is_compiled
        )
    tokens = args.rows * args.length
    peak = devices.peak_flops(device, dtype)
    flops = flops_per_token(config, args.length) * tokens
    rows = [
        {
            "contender": name,
            "precision": precision,
            "tokens_per_second": tokens / taken.median,
            "seconds": taken.seconds,
            "share_of_matmul_rate": flops / taken.median / peak if peak else None,
            "losses": taken.answers,
        }
        for name, taken in in_turn(contenders, args.steps).items()
    ]
    best = {who: max((r for r in rows if who in r["contender"]), key=lambda r: r["tokens_per_second"])
            for who in ("puna", "transformers")}  # fmt: skip
    ratio = best["puna"]["tokens_per_second"] / best["transformers"]["tokens_per_second"]
    result = {"ratio_of_the_best": ratio, "config": config.to_json()}
    if at_once == args.rows:
        record("train_step", rows, {**result, "goal": 1.5})
    else:
        record("train_micro_batches", rows, result)


def puna_step(
    config: ModelConfig,
    batch: Batch,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_compiled: bool,
    layout: Layout,
    settings: Parallel | None = None,
) -> Callable[[int], float]:
    """A function that takes one step of puna's and returns the loss; `batch` is this rank's share of it."""
    settings = settings or Parallel()
    model = DistributedModel.build(
        config, Ranks.of(layout, device), settings, device, dtype=torch.float32,
        compute_dtype=None if dtype == torch.float32 else dtype,
        prepare=partial(prepare_layers, recompute="none", is_compiled=is_compiled),
    )  # fmt: skip
    model.fill(lambda name, shape: initial_weight(name, shape, config, seed=0))
    gradients = Gradients(AdamW(model.weights.items(), Optimizer(weight_decay=0.0), seed=0))
    at_once = len(batch.tokens) // layout.micro_batches
    return lambda update: (
        train_step(
            model, gradients, batch, update=update, lr=LR, micro_batch_rows=at_once, max_grad_norm=1.0
        ).loss
    )  # fmt: skip


def transformers_step(
    config: ModelConfig, batch: Batch, at_once: int, dtype: torch.dtype, device: torch.device, *, is_compiled: bool
) -> Callable[[int], float]:
    """The same with transformers' model, autocast to bf16 over fp32 weights as puna does, and torch's fused AdamW."""
    model = transformers_model(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    forward = torch.compile(model) if is_compiled else model
    tokens = torch.from_numpy(batch.tokens).long().to(device)

    def step(update: int) -> float:
        total = 0.0
        for rows in tokens.split(at_once):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = forward(input_ids=rows, labels=rows).loss * len(rows) / len(tokens)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def transformers_model(config: ModelConfig) -> Any:
    """Transformers' model with the weights that puna's begins with."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{**config.to_json(), "use_cache": False})).train()
    start = Llama(config)
    init_weights(start, seed=0)
    model.load_state_dict(start.state_dict())
    return model


if __name__ == "__main__":
    main()
