"""Generation on this machine: the engine beside transformers and llama.cpp.

    python benchmarks/generation.py [--layers 22] [--precision bf16|fp32] [--only decode,prefill,requests,lookup,bits]
                                    [--llama-cpp PYTHON]

TinyLlama's shape (1.1 B weights in 22 layers, random). All take turns, so that what slows the machine down slows all;
medians count. The share of the memory's rate is weights read for a token, over a large sum's rate.

    decode     1 and 8 sequences, behind a prompt of 64 tokens
    prefill    a prompt of 512 tokens
    requests   64 of mixed length that arrive over time; transformers: static batches of 8, and its continuous batching
    lookup     an edit that repeats a file of 200 lines, with guesses by lookup and without
    bits       1 sequence and a prompt of 512 tokens with weights of 16, 8 and 4 bits, beside llama.cpp (`few_bits.py`);
               recorded as generation_bits. PYTHON has the packages llama-cpp-python, best built from source
               (CMAKE_ARGS=-DGGML_NATIVE=ON), and gguf: a venv of its own serves
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # both as under the command line, and before torch is loaded
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
from few_bits import beside_llama_cpp
from record import arguments, record
from torch import Tensor
from turns import in_turn, timed

from puna.generate import Sampling
from puna.generate.engine import Engine
from puna.generate.engine.scheduler import Running
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.packed import pack_layers

TINY_LLAMA = ModelConfig(32000, 2048, 5632, 22, 32, 4, rope_theta=1e4, max_position_embeddings=2048)


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--only", default="decode,prefill,requests,lookup,bits")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--llama-cpp", metavar="PYTHON", default=sys.executable)
    args = arguments(parser)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.precision]
    config = replace(TINY_LLAMA, num_hidden_layers=args.layers)
    ours = random_model(config, dtype)
    works = args.only.split(",")
    rows: list[dict[str, Any]] = []
    theirs = twin(ours, dtype) if set(works) & {"decode", "prefill", "requests"} else None
    pack_layers(ours)  # as `puna.load` does for inference; the peer keeps the weights as they were
    rate = read_rate()
    read = config.matmul_parameter_count * dtype.itemsize
    if "decode" in works:
        for n in (1, 8):
            rows += decode(ours, theirs, n, lambda step: {"share_of_read_rate": read / step / rate})
    if "prefill" in works:
        rows += prefill(ours, theirs)
    if "requests" in works:
        rows += requests(ours, theirs, args.requests)
    if "lookup" in works:
        rows += lookup(ours)
    facts = {"precision": args.precision, "layers": args.layers, "read_bytes_per_second": rate}
    if rows:
        record("generation", rows, facts)
    if "bits" in works and dtype == torch.bfloat16:
        theirs = None  # its weights make room
        facts["threads"] = torch.get_num_threads()
        record("generation_bits", beside_llama_cpp(ours, args.llama_cpp, rate), facts)


def decode(ours: Llama, theirs: Any, n: int, facts: Callable[[float], dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps of n sequences."""
    prompts = random_prompts(n, 64, ours.config.vocab_size)
    engine = Engine(ours, max_rows=n)
    running = start(engine, prompts, 200)
    while any(each.computed < 64 for each in running):
        engine._compute_step()
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        state = theirs(ids, use_cache=True)
        token, past = state.logits[:, -1:].argmax(-1), state.past_key_values

        def their_step(_: int) -> None:
            nonlocal token, past
            state = theirs(token, past_key_values=past, use_cache=True)
            token, past = state.logits[:, -1:].argmax(-1), state.past_key_values

        taken = in_turn({"puna": lambda _: engine._compute_step(), "transformers": their_step}, 12, warm_ups=2)
    return [
        {"work": f"decode, {n} rows", "contender": name, "tokens_per_second": n / each.median, **facts(each.median)}
        for name, each in taken.items()
    ]


def prefill(ours: Llama, theirs: Any) -> list[dict[str, Any]]:
    """A prompt of 512 tokens, up to its first choice."""
    (prompt,) = random_prompts(1, 512, ours.config.vocab_size)
    ids = torch.tensor([prompt])

    def our_step(_: int) -> None:
        engine = Engine(ours, max_rows=1, cache_tokens=640)
        engine.generate([prompt], Sampling(max_tokens=1))

    def their_step(_: int) -> None:
        with torch.inference_mode():
            theirs(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    taken = in_turn({"puna": our_step, "transformers": their_step}, 5, warm_ups=2)
    return [
        {"work": "prefill, 512", "contender": name, "tokens_per_second": 512 / each.median}
        for name, each in taken.items()
    ]


def requests(ours: Llama, theirs: Any, count: int) -> list[dict[str, Any]]:
    """Mixed lengths that arrive over time: tokens a second, and how long the 95th of a hundred waits for its first."""
    random = np.random.default_rng(0)
    lengths, wanted = random.integers(16, 256, count).tolist(), random.integers(16, 96, count).tolist()
    prompts = [random_prompts(1, n, ours.config.vocab_size, seed=i)[0] for i, n in enumerate(lengths)]
    arrivals = np.cumsum(random.exponential(0.25, count)).tolist()
    rows = []
    for name, serve in (
        ("puna", _serve),
        ("transformers, batches of 8", _static),
        ("transformers, continuous", _continuous),
    ):
        model = ours if name == "puna" else theirs
        try:
            first, seconds = serve(model, prompts, wanted, arrivals)
        except Exception as error:  # a peer that does not run here is said, not left out
            rows.append({"work": f"{count} requests", "contender": name, "error": f"{type(error).__name__}: {error}"})
            continue
        rows.append(
            {"work": f"{count} requests", "contender": name, "tokens_per_second": sum(wanted) / seconds,
             "p95_first_token_seconds": float(np.percentile(first, 95)) if first else None}
        )  # fmt: skip
    return rows


def lookup(ours: Llama) -> list[dict[str, Any]]:
    """A file, then the file again with a changed name: greedy text of a random model repeats nothing, so its choices
    are put in its mouth; the work of a step is that of any text.
    """
    lines = [[1000 + i, *np.random.default_rng(i).integers(3, 900, 11).tolist()] for i in range(200)]
    file = [id for line in lines for id in line]
    edited = [id for i, line in enumerate(lines) for id in ([line[0], 999, *line[2:]] if i % 10 == 0 else line)]
    prompt, script = file[:1200], edited[:400]
    rows = []
    for name in ("puna", "puna, lookup"):
        engine = Engine(ours, max_rows=1, lookup="lookup" in name)
        (running,) = start(engine, [prompt], len(script))
        take = engine._take

        def take_script(chunk: Any, logits: Any, take: Any = take) -> None:
            done = len(chunk.running.tokens) - len(prompt)
            logits.likeliest = script[done : done + len(logits)]
            take(chunk, logits)

        engine._take = take_script  # type: ignore[method-assign]
        while running.computed < len(prompt):
            engine._compute_step()
        started = time.perf_counter()
        while not running.is_done:
            engine._compute_step()
        seconds = time.perf_counter() - started
        rows.append({"work": "edit of 200 lines", "contender": name, "tokens_per_second": len(script) / seconds})
    return rows


def start(engine: Engine, prompts: list[list[int]], most: int) -> list[Running]:
    """Puts prompts in, to be continued greedily."""
    settings = Sampling(max_tokens=most, ignore_eos=True)
    added = [engine._new(engine._sequence(i, prompt, settings, None)) for i, prompt in enumerate(prompts)]
    for running in added:
        engine.scheduler.add(running)
    return added


def random_model(config: ModelConfig, dtype: torch.dtype) -> Llama:
    """Weights drawn quickly."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02 if weight.dim() > 1 else torch.ones(1))
    return model


def twin(model: Llama, dtype: torch.dtype) -> Any:
    """Transformers' model over the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        other = LlamaForCausalLM(LlamaConfig(**{**model.config.to_json(), "use_cache": True})).to(dtype).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    other.model.rotary_emb = type(other.model.rotary_emb)(other.config)
    return other


def random_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Ids that mean nothing."""
    return np.random.default_rng(seed).integers(3, vocabulary, (count, length)).tolist()


def read_rate() -> float:
    """Bytes a second of a sum over 512 MiB: the best of some seconds, since others use the same memory."""
    x = torch.ones(1 << 26, dtype=torch.int64)  # not zeros: those are one page, read again and again
    best = float("inf")
    for _ in range(20):
        best = min(best, timed(x.sum)[0])
        time.sleep(0.25)
    return (1 << 29) / best


def _serve(
    model: Llama, prompts: list[list[int]], wanted: list[int], arrivals: list[float]
) -> tuple[list[float], float]:
    engine = Engine(model, max_rows=64)
    first: dict[int, float] = {}
    began = time.perf_counter()

    def note(index: int) -> None:
        first.setdefault(index, time.perf_counter() - began - arrivals[index])

    waiting = list(range(len(prompts)))
    inside: list[Running] = []
    while waiting or not engine.scheduler.is_idle:
        while waiting and arrivals[waiting[0]] <= time.perf_counter() - began:
            index = waiting.pop(0)
            settings = Sampling(max_tokens=wanted[index], ignore_eos=True)
            inside.append(engine._new(engine._sequence(index, prompts[index], settings, None)))
            engine.scheduler.add(inside[-1])
        if engine.scheduler.is_idle:
            time.sleep(0.005)
            continue
        engine._compute_step()
        for running in inside:
            if len(running.tokens) > len(prompts[running.sequence.index]):
                note(running.sequence.index)
    return list(first.values()), time.perf_counter() - began


def _static(
    model: Any, prompts: list[list[int]], wanted: list[int], arrivals: list[float]
) -> tuple[list[float], float]:
    """Batches of up to 8 of those that are there, each until its longest is done."""
    first, done, began = [], 0, time.perf_counter()
    while done < len(prompts):
        now = time.perf_counter() - began
        here = [i for i in range(done, min(done + 8, len(prompts))) if arrivals[i] <= now]
        if not here:
            time.sleep(0.005)
            continue
        longest = max(len(prompts[i]) for i in here)
        ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in here])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in here])
        seen = _FirstToken()
        most = max(wanted[i] for i in here)
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False,
                           pad_token_id=0, streamer=None, stopping_criteria=[seen])  # fmt: skip
        first += [seen.when - began - arrivals[i] for i in here]
        done += len(here)
    return first, time.perf_counter() - began


class _FirstToken:
    """Notes when the first token of a batch was there."""

    when = 0.0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.when = self.when or time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool)


def _continuous(
    model: Any, prompts: list[list[int]], wanted: list[int], arrivals: list[float]
) -> tuple[list[float], float]:
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=max(wanted), do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(generation_config=settings)
    manager.start()
    began = time.perf_counter()
    try:
        for index, prompt in enumerate(prompts):
            time.sleep(max(0.0, arrivals[index] - (time.perf_counter() - began)))
            manager.add_request(input_ids=prompt, request_id=str(index), max_new_tokens=wanted[index])
        left = len(prompts)
        while left:
            result = manager.get_result(timeout=600)
            if result is None:
                raise TimeoutError("no result in ten minutes")
            left -= result.is_finished()
        return [], time.perf_counter() - began
    finally:
        manager.stop(block=True, timeout=10)


if __name__ == "__main__":
    main()
