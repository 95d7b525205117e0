"""One accelerator: what its products and its memory give, and how much of that a training step reaches.

    python benchmarks/gpu.py limits                 products and copies at their best
    python benchmarks/gpu.py attention              the kernels that may serve attention, forward and backward
    python benchmarks/gpu.py train CASE [--steps 3] a training step; cases are listed by --help
    python benchmarks/gpu.py generate MODEL [--scheme fp8] [--compile]   prompts and decoding of the engine
    python benchmarks/gpu.py products               products of few rows, by torch and by our kernel
    python benchmarks/gpu.py tiles                  our kernels of decoding with other tiles than those in use

`benchmarks/gpu.sh` runs all of it, part by part, and gathers the rows; each case is a process of its own, prints its
row as JSON and needs no file but this package. Weights are random, drawn on the device; rows are one document each.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from random_rows import random_batch
from record import arguments, record
from torch import Tensor
from turns import timed

from puna import devices
from puna.config import Recipe, load_recipe
from puna.model.config import ModelConfig, preset
from puna.model.flops import flops_per_token
from puna.model.llama import Llama
from puna.parallel import collectives
from puna.parallel.layout import Layout
from puna.parallel.mesh import Ranks
from puna.plan.case import Case
from puna.plan.memory import memory
from puna.plan.search import weights_of
from puna.quantized import Quantization, QuantizedLinear, model_without_memory, schemes
from puna.train.build import build
from puna.train.optimizer import local_part
from puna.train.step import train_step

#: Part of the measurements -> its goals on an H200, in words.
GOALS = {
    "train": "600 TFLOP/s by the full convention; 7B 13,000 tokens/s; 34B width 2,725 tokens/s as 48 layers",
    "generate": "bf16, one row: 85 % of the copy's rate; 34B in fp8, two rows: 200 tokens/s; prompts: half of the "
                "product's rate",
    "products": "none; shares of the copy's rate at which weights are read",
    "tiles": "none; shares of the copy's rate at which our kernels read with other tiles than those in use",
    "attention": "none",
}  # fmt: skip

#: Sequences that decode together.
ROWS = (1, 2, 8, 64, 256)

#: How some of them are sampled, as for pass@k.
SAMPLED = {"temperature": 0.8, "top_p": 0.95}

#: Outputs and inputs of 34B's products, and bytes of weights of which none are in a cache when their turn comes again.
SHAPES = ((8192, 8192), (1024, 8192), (22016, 8192), (8192, 22016))
COLD_BYTES = 1 << 30

#: Likewise the shapes that `tiles` looks at: 34B's largest and 7B's.
TILE_SHAPES = ((8192, 8192), (22016, 8192), (8192, 22016), (4096, 4096), (11008, 4096), (4096, 11008))

#: Of the kernel of few rows: outputs of a program x bytes of each that it reads at a time x stages x warps.
PRODUCT_TILES = (
    *((outputs, size, stages, 4)
      for outputs, size in ((16, 256), (16, 512), (32, 128), (32, 256), (32, 512), (64, 128), (64, 256))
      for stages in (3, 4, 6)),
    (16, 512, 4, 2), (32, 256, 4, 2), (32, 256, 4, 8), (64, 128, 4, 8),
)  # fmt: skip

#: Of attention to blocks: bytes of the keys that a program reads at a time x stages, two for each that is on its way.
ATTENTION_TILES = ((8192, 5), (8192, 7), (8192, 9), (16384, 3), (16384, 5), (16384, 7), (32768, 3), (32768, 5))

#: Rows, tokens that each has, and how many programs a multiprocessor is meant to work on: it matters for few rows only.
ATTENTION_CASES = ((64, 4000, (2,)), (1, 16000, (1, 2, 3, 4)))

#: Query heads and key/value heads of 34B, their width, and tokens of a block.
HEADS, BLOCK_TOKENS = (64, 8, 128), 32

#: Calls between two looks at the clock.
AT_ONCE = 10


@dataclass(frozen=True)
class Training:
    """A training step to measure.

    Attributes:
        model: a preset.
        layers: as many of its layers; None: all.
        length: of a row.
        rows: that go through at once; a step has `micro_batches` of them.
        document: tokens of a document; None: a row is one.
        tp: ranks that share every matrix: one is measured, and what the others would send is pretended (torch's fake
            group). It takes as long as computing and handing out do.
        fields: of the recipe, beyond these.
    """

    model: str
    layers: int | None
    length: int
    rows: int
    micro_batches: int = 1
    document: int | None = None
    tp: int = 1
    fields: dict[str, Any] = field(default_factory=dict)


MASTERS = {"precision": "bf16", "recompute": "none", "optimizer": {"state_bits": 8}}
IN_BACKWARD = {"precision": "bf16-pure", "recompute": "block",
               "optimizer": {"state_bits": 4, "in_backward": True, "max_grad_norm": None}}  # fmt: skip

#: Name -> what to measure. 8 bits of state leave room for activations, so that nothing is recomputed; as many rows go
#: through at once as fit an H200 by plan, for what is done once a micro-batch costs a row the less.
TRAINING = {
    "7b": Training("codellama-7b", None, 4096, 3, 6, fields=MASTERS),
    "7b, documents of 512": Training("codellama-7b", None, 4096, 3, 6, 512, fields=MASTERS),
    "7b, rows of 16384": Training("codellama-7b", None, 16384, 1, 2, fields={**MASTERS, "precision": "bf16-pure"}),
    "34b width": Training("codellama-34b", 10, 4096, 4, 4, fields=MASTERS),
    "34b width, rows of 16384": Training("codellama-34b", 10, 16384, 1, 2, fields={**MASTERS}),
    "34b whole": Training("codellama-34b", None, 4096, 2, 1, fields=IN_BACKWARD),
    "34b whole, 34 layers of 48 recomputed": Training(
        "codellama-34b", None, 4096, 2, 1, fields={**IN_BACKWARD, "recompute_layers": 34}
    ),
    "34b width, one of eight parts": Training("codellama-34b", 10, 4096, 1, 4, tp=8, fields=MASTERS),
    "34b width, one of eight parts, eager": Training(
        "codellama-34b", 10, 4096, 1, 4, tp=8, fields={**MASTERS, "compile": False}
    ),
}


def main() -> None:
    """Measures one thing and prints its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("limits")
    what.add_parser("attention")
    what.add_parser("products")
    what.add_parser("tiles")
    training = what.add_parser("train", help=f"cases: {'; '.join(TRAINING)}")
    training.add_argument("case", choices=TRAINING)
    training.add_argument("--steps", type=int, default=3)
    generation = what.add_parser("generate")
    generation.add_argument("model", choices=["codellama-7b", "codellama-34b"])
    generation.add_argument("--scheme", choices=schemes.names())
    generation.add_argument("--compile", action="store_true")
    gathering = what.add_parser("gather", help="records rows that were printed to a file")
    gathering.add_argument("part", choices=GOALS)
    gathering.add_argument("file", type=Path)
    args = arguments(parser)
    if args.what == "gather":
        gather(args.part, [json.loads(line) for line in args.file.read_text().splitlines()])
        return
    device = devices.pick_device()
    if args.what == "train":
        rows: Iterable[dict[str, Any]] = [{"case": args.case, **train(TRAINING[args.case], args.steps, device)}]
    elif args.what == "generate":
        rows = generate(args.model, args.scheme, device, is_compiled=args.compile)
    else:
        parts = {"limits": limits, "attention": attention, "products": products, "tiles": tiles}
        rows = parts[args.what](device)
    for row in rows:
        print(json.dumps({"what": args.what, "device": devices.device_name(device), **row}), flush=True)


def gather(part: str, rows: list[dict[str, Any]]) -> None:
    """Records the rows of a part; the limits that were measured beside them are facts of it."""
    facts = {row["limit"]: row["rate"] for row in rows if row["what"] == "limits"}
    device = {"device": rows[0]["device"]} if rows else {}
    rows = [{name: value for name, value in row.items() if name not in ("what", "device")}
            for row in rows if row["what"] == part]  # fmt: skip
    if not rows:
        raise SystemExit(f"{part}: nothing was measured; the log says why")
    record(f"gpu_{part}", rows, {**device, "goals": GOALS[part], **facts}, command=f"benchmarks/gpu.sh {part}")


def limits(device: torch.device) -> list[dict[str, Any]]:
    """The rate of a large bf16 product of random numbers, and of a large copy."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return [
        {"limit": "bf16 product, 8192 cubed, FLOP/s", "rate": 2 * 8192**3 / seconds_of(lambda: a @ b, device)},
        {"limit": "copy, bytes read and written a second",
         "rate": 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)},
    ]  # fmt: skip


def attention(device: torch.device) -> list[dict[str, Any]]:
    """FLOP/s of the causal half that each kernel reaches."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from puna.model.attention import Documents, attend

    def of_backend(backend: SDPBackend) -> Callable[..., torch.Tensor]:
        def attend_(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        return attend_

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, documents[q.shape[1]])

    documents = {n: Documents.of(np.arange(n)[None] // 512, device) for n in (4096, 16384)}
    rows = []
    for heads, kv_heads in ((32, 32), (64, 8)):
        for length in (4096, 16384):
            kernels = {"flash": of_backend(SDPBackend.FLASH_ATTENTION), "cudnn": of_backend(SDPBackend.CUDNN_ATTENTION),
                       "attend": attend, "attend, documents of 512": packed}  # fmt: skip
            q, k, v = (
                torch.randn(1, length, n, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
                for n in (heads, kv_heads, kv_heads)
            )
            slope = torch.randn_like(q)
            for name, kernel in kernels.items():
                seen = 512 if "documents" in name else length
                forward = 2 * heads * 128 * length * seen
                row: dict[str, Any] = {"kernel": name, "heads": f"{heads}/{kv_heads}", "length": length}
                try:
                    with torch.no_grad():
                        row["forward_flops"] = forward / seconds_of(lambda: kernel(q, k, v), device)  # noqa: B023
                    both = seconds_of(lambda: torch.autograd.grad(kernel(q, k, v), (q, k, v), slope), device)  # noqa: B023
                    row["forward_backward_flops"] = 3.5 * forward / both
                except RuntimeError as error:
                    row["error"] = str(error).splitlines()[0]
                rows.append(row)
    return rows


def train(case: Training, steps: int, device: torch.device) -> dict[str, Any]:
    """Tokens a second, MFU in both conventions, and the memory against the plan's."""
    config = preset(case.model)
    config = replace(config, num_hidden_layers=case.layers or config.num_hidden_layers)
    recipe = _recipe(case)
    if case.tp > 1:
        dist.init_process_group("fake", rank=0, world_size=case.tp)
        collectives._scattered = _own_part
    layout = Layout.of(recipe, config, case.tp)
    started = time.perf_counter()
    model, gradients = build(recipe, config, Ranks.of(layout, device), device)
    _draw(model.weights)
    batch = random_batch(case.rows * case.micro_batches, case.length, config.vocab_size, document=case.document)
    torch.accelerator.synchronize(device)
    seconds, losses = [time.perf_counter() - started], []
    for update in range(1, steps + 3):  # two to compile and to settle
        started = time.perf_counter()
        result = train_step(model, gradients, batch, update=update, lr=1e-5, micro_batch_rows=case.rows,
                            max_grad_norm=recipe.optimizer.max_grad_norm)  # fmt: skip
        torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - started)
        losses.append(result.loss)
        if not result.is_applied:
            raise RuntimeError(f"loss {result.loss}, gradient norm {result.grad_norm}: the time is that of no update")
    step = statistics.median(seconds[3:])
    tokens = batch.tokens.size / case.tp  # of a device
    peak = devices.peak_flops(device, torch.bfloat16)
    seen = case.document or case.length
    flops = {name: flops_per_token(config, seen, convention=name) * tokens / step for name in ("full", "causal")}
    plan = memory(Case(recipe, config, layout, weights_of(recipe, config), has_update_kernel=True), with_runtime=False)
    return {
        "model": case.model,
        "layers": config.num_hidden_layers,
        "micro_batches": case.micro_batches,
        "recipe": {"sequence_length": case.length, "micro_batch_rows": case.rows, **_fields(case)},
        "tokens_per_second": tokens / step,
        "flops_per_second": flops,
        "mfu": {name: rate / peak for name, rate in flops.items()} if peak else None,
        "memory_gib": torch.accelerator.max_memory_allocated(device) / 2**30,
        "planned_gib": plan.gib,
        "planned_moment": plan.moment,
        "seconds": seconds,
        "losses": losses,
    }


def _own_part(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """What a rank that sums with none gets: torch's fake group would leave its part of a sum uninitialised."""
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).flatten(0, 1).contiguous()
    return parts[: len(parts) // group.size()].clone()


class _WrongGuesses:
    """Guesses that are computed with the newest token and never right: what it costs to check some."""

    first = 7

    def read(self, chunks: list[Any]) -> None:
        """As `puna.generate.engine.drafts.Drafter`."""

    def guess(self, wanted: list[tuple[Any, int]]) -> None:
        """Likewise."""
        for running, most in wanted:
            running.drafts = [0] * most  # an id that spells nothing

    def next_length(self, length: int, guessed: int, right: int) -> int:
        """Likewise."""
        return self.first


def generate(name: str, scheme: str | None, device: torch.device, *, is_compiled: bool) -> Iterator[dict[str, Any]]:
    """Tokens a second, and the share of the copy's rate at which weights are read, or of the product's rate."""
    from puna.generate import Sampling
    from puna.generate.engine import Engine

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # not a slower way without a word
    multiplied, copied = (row["rate"] for row in limits(device))
    config, case = preset(name), {"model": name, "scheme": scheme, "is_compiled": is_compiled}
    model = _drawn_model(config, scheme, device)
    table = model.model.embed_tokens.weight.nbytes
    read = sum(x.nbytes for x in (*model.parameters(), *model.buffers())) - table
    engine = Engine(model, max_rows=256, cache_tokens=1 << 16, step_tokens=4096, compile=is_compiled)
    random = np.random.default_rng(0)

    def start(rows: int, prompt: int, **how: float) -> None:
        for index in range(rows):
            ids = random.integers(3, config.vocab_size, prompt).tolist()
            settings = Sampling(max_tokens=200, ignore_eos=True, seed=index, **how)
            engine.scheduler.add(engine._new(engine._sequence(index, ids, settings, None)))

    def stop() -> None:
        for running in [*engine.scheduler.running, *engine.scheduler.waiting]:
            running.is_cancelled = True
        engine.scheduler.drop_finished()

    decoding: dict[str, tuple[int, dict[str, float], Any]] = {
        **{f"{rows} rows decode": (rows, {}, None) for rows in ROWS},
        "64 rows decode, sampled": (64, SAMPLED, None),
        "1 rows decode, 7 wrong guesses": (1, {}, _WrongGuesses()),
    }
    for work, (rows, how, drafter) in decoding.items():
        engine._drafter = engine.scheduler.drafter = drafter
        start(rows, 100, **how)
        while any(running.computed < 100 for running in engine.scheduler.running) or engine.scheduler.waiting:
            engine._compute_step()
        seconds = [timed(engine._step, device)[0] for _ in range(40)][8:]  # the first of them are recorded
        stop()
        step = statistics.median(seconds)
        assert engine._runner._graphs is not None
        size = rows if drafter is None else rows * (1 + drafter.first), drafter is not None
        recorded = {(rows, has_several) for rows, _, has_several in engine._runner._graphs._graphs}
        yield {**case, "work": work, "tokens_per_second": rows / step,
               "share_of_copy_rate": read / step / copied, "share_of_product_rate": None,
               "is_recorded": size in recorded}  # fmt: skip
    engine._drafter = engine.scheduler.drafter = None
    for prompt in (1024, 4096):
        seconds = []
        for _ in range(4):
            start(1, prompt)
            seconds.append(timed(engine._step, device)[0])
            stop()
        step = statistics.median(seconds[1:])
        flops = flops_per_token(config, prompt, convention="causal") / 3 * prompt
        flops -= 2 * config.hidden_size * config.vocab_size * (prompt - 1)  # the head multiplies the last token alone
        yield {**case, "work": f"a prompt of {prompt}", "tokens_per_second": prompt / step,
               "share_of_product_rate": flops / step / multiplied}  # fmt: skip


def products(device: torch.device) -> Iterator[dict[str, Any]]:
    """Shares of the copy's rate at which weights are read for few rows, as a recorded step reads them."""
    from puna.quantized.few_rows_kernel import multiply
    from puna.quantized.schemes.fp8 import FP8, round_rows

    _, copied = (row["rate"] for row in limits(device))
    for outputs, inputs in SHAPES:
        shape = -(-COLD_BYTES // (outputs * inputs)), outputs, inputs
        drawn, scales = torch.randn(shape, device=device, dtype=torch.bfloat16), torch.rand(outputs, 1, device=device)
        fp8, int8 = drawn.to(FP8), torch.randint(-127, 128, shape, device=device, dtype=torch.int8)
        for rows in (1, 2, 8, 64):
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            rounded, x_scales = round_rows(x)
            by_torch = partial(
                torch._scaled_mm, rounded, scale_a=x_scales, scale_b=scales.t(), out_dtype=torch.bfloat16
            )
            of_fp8 = partial(_by_kernel, multiply, rounded, scales.view(-1), row_scales=x_scales.view(-1))
            ways = {
                "bf16, torch": (partial(F.linear, x), drawn),
                "bf16, kernel": (partial(_by_kernel, multiply, x, None), drawn),
                "fp8, torch": (by_torch, fp8.mT),
                "fp8, kernel": (of_fp8, fp8),
                "int8, kernel": (partial(_by_kernel, multiply, x, scales.view(-1)), int8),
            }
            yield {"rows": rows, "inputs": inputs, "outputs": outputs, **_shares(ways, copied, device)}


def tiles(device: torch.device) -> Iterator[dict[str, Any]]:
    """Shares of the copy's rate at which our kernels of decoding read, with many tiles, the best first."""
    _, copied = (row["rate"] for row in limits(device))
    build_together(partial(way, reading.pieces[0]) for reading in readings(device) for way in reading.ways().values())
    for reading in readings(device):
        ways = {name: (way, reading.pieces) for name, way in reading.ways().items()}
        shares = _shares(ways, copied, device, least=0.02)
        rest = {name: shares.pop(name) for name in ("in_use", "errors") if name in shares}
        ranked = dict(sorted(shares.items(), key=lambda item: -item[1]))
        best = ", ".join(f"{name} {share:.2f}" for name, share in list(ranked.items())[:3])
        yield {**reading.case, **rest, "best": best, "shares": ranked}


@dataclass(frozen=True)
class Reading:
    """What a kernel reads, to be read with many tiles.

    Attributes:
        case: in words.
        read: takes one of the pieces.
        pieces: so many that none is in a cache when its turn comes again.
        tiles: name -> the constants of `module` that make the kernel take it.
        module: of the kernel.
    """

    case: dict[str, Any]
    read: Callable[[torch.Tensor], torch.Tensor]
    pieces: torch.Tensor
    tiles: dict[str, dict[str, Any]]
    module: Any

    def ways(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Reading as it is, and with each of the tiles."""
        return {"in_use": self.read, **{name: partial(self._with, tile) for name, tile in self.tiles.items()}}

    def _with(self, constants: dict[str, Any], piece: torch.Tensor) -> torch.Tensor:
        with patch.multiple(self.module, **constants):
            return self.read(piece)


def readings(device: torch.device) -> Iterator[Reading]:
    """One after the other, for all of them do not fit a device together."""
    from puna.generate.engine import paged_attention_kernel
    from puna.quantized import few_rows_kernel
    from puna.quantized.schemes.fp8 import FP8, round_rows

    of_products = {
        "x".join(map(str, tile)): {"TILES": {16: tile[:2]}, "STAGES": tile[2], "WARPS": tile[3],
                                   "FEW_OUTPUTS": 0, "FEW_OUTPUTS_OF_INT8": 0}
        for tile in PRODUCT_TILES
    }  # fmt: skip
    for outputs, inputs in TILE_SHAPES:
        shape = -(-COLD_BYTES // (outputs * inputs)), outputs, inputs
        drawn, scales = torch.randn(shape, device=device, dtype=torch.bfloat16), torch.rand(outputs, device=device)
        int8 = torch.randint(-127, 128, shape, device=device, dtype=torch.int8)
        for rows in (1, 8):
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            rounded, x_scales = round_rows(x)
            product = partial(_by_kernel, few_rows_kernel.multiply)
            of_fp8 = partial(product, rounded, scales, row_scales=x_scales.view(-1))
            kinds = {"bf16": (partial(product, x, None), drawn), "fp8": (of_fp8, drawn.to(FP8)),
                     "int8": (partial(product, x, scales), int8)}  # fmt: skip
            for name, (read, weights) in kinds.items():
                case = {"read": name, "rows": rows, "outputs": outputs, "inputs": inputs}
                yield Reading(case, read, weights, of_products, few_rows_kernel)

    heads, kv_heads, width = HEADS
    for rows, tokens, programs in ATTENTION_CASES:
        blocks = rows * -(-tokens // BLOCK_TOKENS)
        shape = 2, blocks, BLOCK_TOKENS, kv_heads, width
        pools = torch.randn(-(-COLD_BYTES // (2 * math.prod(shape))), *shape, device=device, dtype=torch.bfloat16)
        tables = torch.randperm(blocks, device=device).view(rows, -1).int()
        lengths = torch.full((rows,), tokens, dtype=torch.int32, device=device)
        q = torch.randn(rows, heads, width, device=device, dtype=torch.bfloat16)
        read = partial(_attended, paged_attention_kernel.attend_paged, q, tables, lengths)
        of_attention = {
            f"{size}x{stages}x{each}": {"TILE_BYTES": size, "STAGES": stages, "PROGRAMS_EACH": each}
            for size, stages in ATTENTION_TILES for each in programs
        }  # fmt: skip
        case = {"read": "keys and values", "rows": rows, "tokens": tokens}
        yield Reading(case, read, pools, of_attention, paged_attention_kernel)


def _attended(
    attend: Callable[..., torch.Tensor], q: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor,
    pools: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    return attend(q, *pools, tables, lengths)


def build_together(calls: Iterable[Callable[[], object]]) -> None:
    """Has Triton build the kernels that calls would launch, many at a time; it launches none, and leaves what fails."""
    import triton
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def build(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *args, warmup=True, **options)

    with (
        patch.object(JITFunction, "run", build),
        ThreadPoolExecutor() as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for call in calls:
            call()


def _by_kernel(
    multiply: Callable[..., torch.Tensor], x: torch.Tensor, scales: torch.Tensor | None, weight: torch.Tensor,
    **options: Any,
) -> torch.Tensor:  # fmt: skip
    return multiply(x, [weight], [] if scales is None else [scales], **options)


def _shares(
    ways: dict[str, tuple[Callable[..., torch.Tensor], torch.Tensor]], copied: float, device: torch.device,
    *, least: float = 0.1,
) -> dict[str, Any]:  # fmt: skip
    """Shares of the copy's rate at which products read their weights; those that fail cost no other, and are named."""
    shares: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name, (product, weights) in ways.items():
        try:
            shares[name] = weights[0].nbytes / _seconds_of_each(product, weights, device, least=least) / copied
        except Exception as error:  # Triton's own are no RuntimeErrors
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {**shares, "errors": errors} if errors else shares


def _seconds_of_each(
    product: Callable[..., torch.Tensor], weights: torch.Tensor, device: torch.device, *, least: float = 0.1
) -> float:
    """Of a product with each of several weights, recorded together, so that no launch is waited for."""
    product(weights[0])  # what is built at first use is not recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            product(weight)
    return seconds_of(graph.replay, device, least=least) / len(weights)


def _drawn_model(config: ModelConfig, scheme: str | None, device: torch.device) -> Llama:
    """A model of random weights, in bf16 or quantised."""
    quantization = None if scheme is None else Quantization.of(scheme, None, config)
    model = model_without_memory(config, quantization)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.to_empty(device=device)
    _draw(dict(model.named_parameters()))
    model.compute_dtype = torch.bfloat16
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            weight = torch.empty(layer.out_features, layer.in_features, device=device).normal_(0, 0.02)
            for part, values in layer.quantize(weight, layer.group_size).items():
                setattr(layer, part, values)
            layer.pack()
    return model


def seconds_of(work: Callable[[], object], device: torch.device, *, least: float = 0.3) -> float:
    """Median seconds of a call, over some runs of ten calls that together take `least` seconds or more."""
    found: list[float] = []
    for _ in range(3):
        work()
    while sum(found) * AT_ONCE < least or len(found) < 5:
        torch.accelerator.synchronize(device)
        started = time.perf_counter()
        for _ in range(AT_ONCE):
            work()
        torch.accelerator.synchronize(device)
        found.append((time.perf_counter() - started) / AT_ONCE)
    return statistics.median(found)


def _recipe(case: Training) -> Recipe:
    return load_recipe(
        {
            "model": case.model,
            "data": {"train": "random"},
            "sequence_length": case.length,
            "run_dir": "unused",
            "steps": 1,
            "batch_tokens": case.length * case.rows * case.micro_batches,
            "micro_batch_rows": case.rows,
            "compile": True,
            **_fields(case),
        }
    )


def _fields(case: Training) -> dict[str, Any]:
    return case.fields if case.tp == 1 else {**case.fields, "parallel": {"tp": case.tp}}


@torch.no_grad()
def _draw(weights: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for weight in map(local_part, weights.values()):
        weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1)


if __name__ == "__main__":
    main()
