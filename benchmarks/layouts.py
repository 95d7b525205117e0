"""Two processes that share the weights, beside one process with two threads, and beside transformers' model so shared.

    python benchmarks/layouts.py [--steps 5] [--eager] [--precision bf16|fp32|auto] [--vocab 32000]

The same model (8 layers x 512, rows of 1,024, random tokens, same start) takes the same global batch in turn, step by
step: in one process with two threads; in two gloo processes of one thread each with dp_shard 2; and in the same two
processes with transformers' LlamaForCausalLM, torch's `fully_shard` around each layer and around the whole, and torch's
fused AdamW. Whoever's turn it is not waits without computing. Each runs eager and compiled, and in two processes with
weights gathered once or twice a step; the best median of each counts. Losses must agree.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from random_rows import random_batch
from record import arguments, record
from train_step import LR, puna_step, transformers_model
from turns import Taken, in_turn

from puna import devices
from puna.config import Parallel
from puna.data.loader import Batch
from puna.model.config import ModelConfig, preset
from puna.parallel.layout import Layout

RANKS = 2
ALONE, SHARED, PEER = "puna, one process", "puna, dp_shard 2", "transformers, fully_shard"
GOALS = {"of_one_process": 0.9, "of_the_peer": 1.5}

#: Takes the step of a number and returns the loss of the global batch.
Step = Callable[[int], float]


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--eager", action="store_true", help="leave the compiled contenders out")
    args = arguments(parser)
    if args.precision == "auto":
        args.precision = "bf16" if devices.cpu_bf16_units() else "fp32"
    tokens = args.rows * args.length
    rows = [
        {
            "contender": name,
            "precision": args.precision,
            "tokens_per_second": tokens / taken.median,
            "processor_seconds": statistics.median(spent for _, spent in taken.answers[1:]),
            "seconds": taken.seconds,
            "losses": [loss for loss, _ in taken.answers],
        }
        for name, taken in measure(args).items()
    ]
    best = {who: max(row["tokens_per_second"] for row in rows if row["contender"].startswith(who))
            for who in (ALONE, SHARED, PEER)}  # fmt: skip
    ratios = {"of_one_process": best[SHARED] / best[ALONE], "of_the_peer": best[SHARED] / best[PEER]}
    record("layouts", rows, {"ratios": ratios, "goals": GOALS, "config": shape(args).to_json(),
                             "missed": ", ".join(name for name in GOALS if ratios[name] < GOALS[name])})  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, Taken]:
    """The steps of each contender, which answer with their loss and the processor seconds of all its processes."""
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # threads that wait for their turn sleep, as under the command line
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for all, likewise
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends: list[Connection] = []
        processes = []
        for number in (None, *range(RANKS)):
            here, there = context.Pipe()
            ends.append(here)
            processes.append(context.Process(target=serve, args=(number, Path(folder), args, there), daemon=True))
            processes[-1].start()
        alone, *ranks = ends
        turns = {name: partial(ordered, [alone], name) for name in alone.recv()}
        for rank in ranks:  # all have the same
            turns |= {name: partial(ordered, ranks, name) for name in rank.recv()}
        taken = in_turn(turns, args.steps)
        for end in ends:
            end.send(None)
        for process in processes:
            process.join()
    tolerance = 1e-4 if args.precision == "fp32" else 3e-2
    for update, of_update in enumerate(zip(*(each.answers for each in taken.values()), strict=True), start=1):
        losses = [loss for loss, _ in of_update]
        assert max(losses) - min(losses) < tolerance * max(losses), f"losses of step {update}: {losses}"
    return taken


def ordered(workers: list[Connection], name: str, update: int) -> tuple[float, float]:
    """Lets a contender's processes take a step; its loss, and the processor seconds of all of them."""
    for worker in workers:
        worker.send((name, update))
    losses, spent = zip(*(worker.recv() for worker in workers), strict=True)
    return losses[0], sum(spent)


def serve(rank: int | None, folder: Path, args: argparse.Namespace, end: Connection) -> None:
    """Takes steps when told to, as one of the ranks or as the process that is alone."""
    torch.set_num_threads(1 if rank is not None else RANKS)
    devices.keep_freed_memory()  # for the peer too, as `puna train` does for itself
    batch = random_batch(args.rows, args.length, args.vocab)
    contenders: dict[str, Step] = {}
    if rank is not None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
        share = args.rows // RANKS
        batch = batch[rank * share : (rank + 1) * share]
    step_of = partial(puna_step, shape(args), batch, dtype(args), torch.device("cpu"))
    for is_compiled in (False,) if args.eager else (False, True):
        how = "compiled" if is_compiled else "eager"
        if rank is None:
            contenders[f"{ALONE}, {how}"] = step_of(layout=Layout(), is_compiled=is_compiled)
            continue
        for reshard in (True, False):
            more = f"{how}, gathered {'twice' if reshard else 'once'}"
            settings = Parallel(dp_shard=RANKS, reshard=reshard)
            contenders[f"{SHARED}, {more}"] = step_of(
                layout=Layout(dp_shard=RANKS), settings=settings, is_compiled=is_compiled
            )
            contenders[f"{PEER}, {more}"] = peer_step(args, batch, reshard=reshard, is_compiled=is_compiled)
    end.send(list(contenders))
    while (order := end.recv()) is not None:
        name, update = order
        started = time.process_time()
        end.send((contenders[name](update), time.process_time() - started))
    if rank is not None:
        dist.destroy_process_group()


def peer_step(args: argparse.Namespace, batch: Batch, *, reshard: bool, is_compiled: bool) -> Step:
    """The same with transformers' model, sharded by torch, and torch's fused AdamW."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = transformers_model(shape(args))
    policy = MixedPrecisionPolicy(param_dtype=dtype(args), reduce_dtype=torch.float32)
    for layer in model.model.layers:
        if is_compiled:
            layer.compile()
        fully_shard(layer, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    tokens = torch.from_numpy(batch.tokens).long()

    def step(update: int) -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach().float()
        dist.all_reduce(mean)
        return mean.item() / RANKS

    return step


def shape(args: argparse.Namespace) -> ModelConfig:
    """The model that all train."""
    return replace(preset("tiny-512"), vocab_size=args.vocab)


def dtype(args: argparse.Namespace) -> torch.dtype:
    """Of activations."""
    return torch.bfloat16 if args.precision == "bf16" else torch.float32


if __name__ == "__main__":
    main()
