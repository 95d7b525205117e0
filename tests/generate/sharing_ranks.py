"""Completes prompts by engines that share a model; started as four processes.

    sharing_ranks.py results folder …

Two and two of them share the model of each folder, then all four. Each rank writes to `results/RANK.json` what it
chose, what it holds, and a fingerprint of its logits.
"""

import asyncio
import hashlib
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from puna.checkpoint import load
from puna.errors import UsageError
from puna.generate import Engine, Sampling
from puna.generate.engine.scheduler import Running
from puna.parallel.inference import Share
from puna.parallel.mesh import process_group

SHARED = [1, *range(40, 60)]
PROMPTS = [SHARED, [5, 6, 7, 8, 5, 6], SHARED[:13], [1], list(range(3, 33)), SHARED]
GREEDY = [Sampling(max_tokens=12, ignore_eos=True)] * len(PROMPTS)
SAMPLED = [
    Sampling(max_tokens=12 - i, temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=i)
    for i in range(len(PROMPTS))
]


def results_of(folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """What this rank's engine gives for a model that it shares with a group."""
    model, _ = load(folder, dtype=torch.float32, share=partial(Share, group=group))
    # 14 blocks for three rows of up to 11: some give way, and are computed again.
    room: dict[str, Any] = {"cache_tokens": 56, "block_tokens": 4, "max_rows": 3, "step_tokens": 10}
    engine = Engine(model, lookup=True, **room)
    whole, _ = load(folder, dtype=torch.float32)
    drafting = Engine(model, draft=whole, cache_dtype="int8", **room)
    given_way: list[Running] = []
    preempt = engine.scheduler._preempt
    engine.scheduler._preempt = lambda running: (given_way.append(running), preempt(running))  # type: ignore
    with torch.inference_mode():
        logits = model(torch.tensor([SHARED]))
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "kv_heads": engine._runner.cache.keys.numbers.shape[-2],
        "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        "greedy": [completion.tokens for completion in engine.generate(PROMPTS, GREEDY)],
        "sampled": [completion.tokens for completion in engine.generate(PROMPTS, SAMPLED)],
        "in_int8": [completion.tokens for completion in drafting.generate(PROMPTS, GREEDY)],
        "given_way": len(given_way),
        "leaked": engine.pool.n_blocks - engine.pool.n_free,
        "stream": asyncio.run(_refusal(engine)),
    }


async def _refusal(engine: Engine) -> str:
    try:
        await anext(engine.stream([5]))
    except UsageError as error:
        return str(error)
    return ""


def main() -> None:
    """Writes the results of every folder."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    results, *folders = map(Path, sys.argv[1:])
    with process_group(torch.device("cpu")):
        two, _ = dist.new_subgroups(2)
        groups = [two, dist.group.WORLD]
        found = {group.size(): {folder.name: results_of(folder, group) for folder in folders} for group in groups}
        (results / f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
