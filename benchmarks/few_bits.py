"""Weights of 16, 8 and 4 bits: the engine beside llama.cpp, as a part of `generation.py`.

llama.cpp runs in processes of its own, one a type, each with a file of random weights in the same shape. Contenders
take turns, and who waits does nothing. A turn is a prompt of 64 tokens and the steps behind it, then a prompt of 512.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from in_llama_cpp import TYPES
from torch import nn
from turns import timed

from puna.generate import Sampling
from puna.generate.engine import Engine
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.packed import pack_layers
from puna.quantized import Quantization, QuantizedLinear, model_without_memory

SCHEMES = ("int8", "int4")

#: So that memory of llama.cpp's own lies in large pages, too, where glibc gives it.
LARGE_PAGES = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
PEER = Path(__file__).with_name("in_llama_cpp.py")
STEPS = 12
PROMPT = 512


@dataclass
class Contender:
    """Someone who generates: `run("decode", n)` gives the seconds of n steps, `run("prefill", n)` of one prompt."""

    size_bytes: int
    run: Callable[[str, int], list[float]]


def beside_llama_cpp(plain: Llama, python: str, read_rate: float, turns: int = 12) -> list[dict[str, Any]]:
    """Tokens a second of each contender: the median, and the best, which others on the machine disturb less.

    Args:
        plain: the model in bf16, packed.
        python: the interpreter that has llama.cpp.
        read_rate: bytes a second that this machine reads.
        turns: of each contender; the first does not count.
    """
    config = plain.config
    contenders = {"puna, bf16": _ours(plain, 2 * config.matmul_parameter_count)}
    for scheme in SCHEMES:
        model = random_quantized(config, scheme)
        size = sum(buffer.nbytes for layer in _quantized(model) for buffer in layer.buffers())
        contenders[f"puna, {scheme}"] = _ours(model, size)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        failed = _make(python, file, config)
        peers: list[subprocess.Popen[str]] = []
        for kind in TYPES:
            if failed:
                rows.append({"work": "weights", "contender": f"llama.cpp, {kind}", "error": failed})
                continue
            arguments = [python, str(PEER), "runs", str(file), kind, str(torch.get_num_threads())]
            peers.append(
                subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=LARGE_PAGES, text=True)
            )
            contenders[f"llama.cpp, {kind}"] = _theirs(peers[-1])
        try:
            rows = _taken_in_turn(contenders, turns, read_rate) + rows
        finally:
            for peer in peers:
                peer.communicate()  # no more work: it ends
    return rows


def random_quantized(config: ModelConfig, scheme: str) -> Llama:
    """A model whose weights are quantised; layers of one shape hold equal numbers, each in memory of its own."""
    model = model_without_memory(config, Quantization.of(scheme, None, config))
    drawn: dict[Any, dict[str, torch.Tensor]] = {}
    for layer in _quantized(model):
        shape = type(layer), layer.out_features, layer.in_features
        if shape not in drawn:
            weight = torch.randn(layer.out_features, layer.in_features) * 0.02
            drawn[shape] = layer.quantize(weight, layer.group_size)
        for name, values in drawn[shape].items():
            setattr(layer, name, values.clone())
        layer.pack(torch.bfloat16)
    for module in model.modules():
        for name, empty in module.named_parameters(recurse=False):
            values = torch.ones(empty.shape) if empty.dim() == 1 else torch.randn(empty.shape) * 0.02
            setattr(module, name, nn.Parameter(values.bfloat16()))
    model.compute_dtype = torch.bfloat16
    pack_layers(model)  # as `puna.load` does for inference
    return model


def _quantized(model: Llama) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def _ours(model: Llama, size_bytes: int) -> Contender:
    ids = torch.randint(3, model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()

    def run(work: str, count: int) -> list[float]:
        if work == "prefill":
            engine = Engine(model, max_rows=1, cache_tokens=count + 128)
            return [timed(lambda: engine.generate([ids[:count]], Sampling(max_tokens=1)))[0]]
        engine = Engine(model, max_rows=1, cache_tokens=256)
        settings = Sampling(max_tokens=count + 1, ignore_eos=True)
        running = engine._new(engine._sequence(0, ids[:64], settings, None))
        engine.scheduler.add(running)
        while running.computed < 64:
            engine._compute_step()
        return [timed(engine._step)[0] for _ in range(count)]

    return Contender(size_bytes, run)


def _make(python: str, file: Path, config: ModelConfig) -> str | None:
    """Why there is no file for llama.cpp; None: there is."""
    arguments = [python, str(PEER), "makes", str(file), json.dumps(config.to_json())]
    missing = "import gguf, llama_cpp"
    for command in ([python, "-c", missing], arguments):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    return None


def _theirs(peer: "subprocess.Popen[str]") -> Contender:
    assert peer.stdin is not None
    assert peer.stdout is not None
    asks, answers = peer.stdin, peer.stdout
    greeting = answers.readline()
    if not greeting:
        return Contender(0, lambda work, count: [])

    def run(work: str, count: int) -> list[float]:
        print(work, count, file=asks, flush=True)
        answer = answers.readline()
        found: list[float] = json.loads(answer) if answer else []
        return found

    return Contender(json.loads(greeting)["size_bytes"], run)


def _taken_in_turn(contenders: dict[str, Contender], turns: int, read_rate: float) -> list[dict[str, Any]]:
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(turns + 1):
        for name, contender in contenders.items():
            for work, count in (("decode", STEPS), ("prefill", PROMPT)):
                time.sleep(0.05)  # until the threads of the one before stop waiting for work
                taken = contender.run(work, count)
                if turn:
                    seconds.setdefault((work, name), []).extend(taken)
    least = {name: contender.size_bytes / read_rate for name, contender in contenders.items()}
    return [_row(work, name, least[name], taken) for (work, name), taken in sorted(seconds.items())]


def _row(work: str, name: str, seconds_to_read: float, seconds: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"work": "decode, 1 row" if work == "decode" else f"prefill, {PROMPT}", "contender": name}
    if not seconds:
        return {**row, "error": "its process ended"}
    tokens = 1 if work == "decode" else PROMPT
    row |= {"tokens_per_second": tokens / median(seconds), "best_tokens_per_second": tokens / min(seconds)}
    return row | ({"share_of_read_rate": seconds_to_read / median(seconds)} if work == "decode" else {})
