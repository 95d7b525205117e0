"""The engine against the plain loop: the same tokens, whatever else runs, waits, gives way or is known already."""

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.errors import PunaError, UsageError
from puna.generate import Completion, Sampling, complete
from puna.generate.engine import Engine
from puna.generate.engine import engine as engine_module
from puna.generate.engine.blocks import ROOT, BlockPool, OutOfBlocks, key_of
from puna.generate.engine.cache import Step
from puna.generate.engine.drafts import PromptLookup
from puna.generate.engine.graphs import DecodeGraphs
from puna.generate.engine.network import ByModules
from puna.generate.engine.paged_attention import MOST_TOKENS
from puna.generate.engine.scheduler import OutgrowsCache, Running
from puna.generate.sequence import Sequence
from puna.model.llama import Llama
from puna.model.packed import pack_layers
from puna.testing import PeakAnonymousMemory, ScriptedModel, tiny_model
from puna.tokenizer import Tokenizer

SHARED = [1, *range(40, 60)]


def assert_all_free(engine: Engine) -> None:
    assert engine.scheduler.is_idle
    assert engine.pool.n_free == engine.pool.n_blocks
    assert not any(engine.pool._holders)


PROMPTS = st.one_of(
    st.lists(st.integers(3, 511), min_size=1, max_size=30),
    st.integers(1, 21).map(lambda n: SHARED[:n]),  # beginnings that are known already
    st.lists(st.integers(3, 6), min_size=8, max_size=30),  # repeats itself: there is something to look up
)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.8]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 9),
    stop_ids=st.lists(st.integers(3, 511), max_size=30).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(PROMPTS, SAMPLINGS), min_size=1, max_size=8),
    arrivals=st.lists(st.integers(0, 20), min_size=8, max_size=8),
    cancelled=st.lists(st.integers(0, 40), max_size=3),
    block_tokens=st.sampled_from([1, 4, 8]),
    n_tokens=st.integers(64, 200),
    step_tokens=st.integers(1, 40),
    max_rows=st.integers(1, 6),
    lookup=st.booleans(),
    draws=st.booleans(),
)
def test_every_schedule_gives_the_tokens_of_the_plain_loop(
    precise_model: Llama,
    requests: list[tuple[list[int], Sampling]],
    arrivals: list[int],
    cancelled: list[int],
    block_tokens: int,
    n_tokens: int,
    step_tokens: int,
    max_rows: int,
    lookup: bool,
    draws: bool,
) -> None:
    engine = Engine(
        precise_model, max_rows=max_rows, cache_tokens=n_tokens, step_tokens=step_tokens, block_tokens=block_tokens,
        lookup=lookup,
    )  # fmt: skip
    engine._draws = draws  # as where logits lie on an accelerator
    entered = [
        (arrival, engine._new(engine._sequence(index, prompt, sampling, None)))
        for index, ((prompt, sampling), arrival) in enumerate(zip(requests, arrivals, strict=False))
    ]
    late = {step for step in cancelled if step > 0}
    doomed = entered[-1][1] if late else None
    for step in range(4000):
        for arrival, running in entered:
            if arrival == step:
                engine.scheduler.add(running)
        if step in late and doomed is not None:
            doomed.is_cancelled = True
        engine._step()
        if step > 20 and engine.scheduler.is_idle:
            break
    engine.scheduler.drop_finished()
    assert_all_free(engine)
    for (prompt, sampling), (_, running) in zip(requests, entered, strict=False):
        (expected,) = complete(precise_model, None, [prompt], sampling)
        if running is doomed and running.is_cancelled and running.sequence.finish is None:
            found = running.tokens[len(prompt) :]
            assert found == expected.tokens[: len(found)]
        else:
            assert running.sequence.completion() == expected


@pytest.mark.parametrize(("cache_tokens", "most"), [(2000, 200), (500, 50)])
def test_as_many_sequences_run_at_a_time_as_there_are_blocks_for(model: Llama, cache_tokens: int, most: int) -> None:
    engine, rows = Engine(model, cache_tokens=cache_tokens, block_tokens=10), []
    compute = engine._runner.compute
    engine._runner.compute = lambda chunks: rows.append(len(chunks)) or compute(chunks)  # type: ignore
    engine.generate([[1, id] for id in range(3, 203)], Sampling(max_tokens=6, ignore_eos=True))
    assert max(rows) == most
    assert_all_free(engine)


def test_texts_streams_and_stops_are_those_of_the_loop(model: Llama, tokenizer: Tokenizer) -> None:
    prompts = ["def add(a, b):", "import os\n", "class Thing", "for i in range("] * 3
    samplings = [Sampling(max_tokens=30, temperature=0.9, seed=i, stop=("e", "\n\n")) for i in range(len(prompts))]
    expected = complete(model, tokenizer, [tokenizer.encode(p, bos=True) for p in prompts], samplings)
    texts = [""] * len(prompts)
    ended: dict[int, Completion] = {}

    def on_text(index: int, piece: str) -> None:
        texts[index] += piece

    engine = Engine(model, tokenizer, cache_tokens=256, block_tokens=8, max_rows=5)
    found = engine.generate(prompts, samplings, on_text=on_text, on_completion=ended.__setitem__)
    assert found == expected
    assert texts == [completion.text for completion in expected]
    assert [ended[i] for i in range(len(prompts))] == expected
    assert_all_free(engine)


def test_a_known_beginning_is_not_computed_again(model: Llama) -> None:
    engine = Engine(model, cache_tokens=256, block_tokens=4)
    seen: list[int] = []
    hidden = model.hidden
    prompt = list(range(3, 30))
    try:
        model.hidden = lambda tokens, **rest: seen.append(tokens.shape[1]) or hidden(tokens, **rest)  # type: ignore
        first = engine.generate([prompt], Sampling(max_tokens=1))
        again = engine.generate([prompt], Sampling(max_tokens=1))
    finally:
        del model.hidden
    assert seen == [27, 3], "24 tokens, six blocks, were there"
    assert first == again


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_was_computed_with_other_weights_is_not_known(tokenizer: Tokenizer, is_streamed: bool) -> None:
    model, sampling = tiny_model(), Sampling(max_tokens=10, ignore_eos=True)
    engine = Engine(model, tokenizer, cache_tokens=256, block_tokens=4)

    async def stream() -> str:
        return "".join([piece async for piece in engine.stream(SHARED, max_tokens=10, ignore_eos=True)])

    for number in range(3):
        text = asyncio.run(stream()) if is_streamed else engine.generate([SHARED], sampling)[0].text
        assert text == complete(model, tokenizer, [SHARED], sampling)[0].text
        generator = torch.Generator().manual_seed(number)
        for weight in model.model.layers[number % 2].parameters():
            weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)  # unseen by version counters
        while engine._thread is not None:
            time.sleep(0.001)
    assert_all_free(engine)


def test_decoding_goes_on_while_a_long_prompt_is_read(model: Llama) -> None:
    engine = Engine(model, cache_tokens=512, block_tokens=8, step_tokens=10, max_rows=4)
    short = engine._new(engine._sequence(0, [5, 6], Sampling(max_tokens=50, ignore_eos=True), None))
    engine.scheduler.add(short)
    engine._step()
    long = engine._new(engine._sequence(1, list(range(3, 103)), Sampling(max_tokens=1), None))
    engine.scheduler.add(long)
    for step in range(1, 11):
        engine._step()
        assert len(short.tokens) == 3 + step, "a token a step"
        assert long.computed == min(9 * step, 99)
    long.is_cancelled = short.is_cancelled = True
    engine.scheduler.drop_finished()
    assert_all_free(engine)


def test_lookup_takes_fewer_steps_for_the_same_text() -> None:
    steps = []
    texts = []
    script = [*range(20, 50), *range(20, 40), 99, *range(41, 50)] * 5
    for lookup in (False, True):
        engine = Engine(ScriptedModel(script, prompt_tokens=2), cache_tokens=2048, lookup=lookup)  # type: ignore
        running = engine._new(engine._sequence(0, [7, 8], Sampling(max_tokens=300, ignore_eos=True), None))
        engine.scheduler.add(running)
        count = 0
        while not running.is_done:
            engine._step()
            count += 1
        steps.append(count)
        texts.append(running.tokens)
    assert texts[0] == texts[1] == [7, 8, *script]
    assert steps[0] == 300
    assert steps[1] < 100


def test_a_text_that_repeats_is_continued_as_it_went_on() -> None:
    lookup = PromptLookup()
    running = Running(Sequence(0, [1, 2, 3, 4, 5], Sampling(), tiny_model().config, None))

    def guess(most: int) -> list[int]:
        lookup.guess([(running, most)])
        return running.drafts

    assert guess(8) == []
    running.tokens.extend([9, 2, 3])
    assert guess(8) == [4, 5, 9, 2, 3]
    assert guess(2) == [4, 5]
    assert lookup.next_length(6, 5, 5) == 12
    assert lookup.next_length(24, 24, 24) == 24
    assert [lookup.next_length(6, 6, right) for right in (0, 1, 5)] == [2, 2, 6], "fewer where they were wrong"


def test_streams_run_side_by_side_and_leaving_one_frees_its_blocks(model: Llama, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, cache_tokens=512, block_tokens=8)

    async def whole(prompt: str) -> str:
        return "".join([piece async for piece in engine.stream(prompt, max_tokens=40, ignore_eos=True)])

    async def beginning(prompt: str) -> str:
        async for piece in engine.stream(prompt, max_tokens=400, ignore_eos=True):
            return piece
        return ""

    async def all_of_them() -> list[str]:
        return await asyncio.gather(whole("def f"), beginning("import"), whole("class A"))

    first, piece, last = asyncio.run(all_of_them())
    for text, prompt in ((first, "def f"), (last, "class A")):
        tokens = tokenizer.encode(prompt, bos=True)
        assert text == complete(model, tokenizer, [tokens], Sampling(max_tokens=40, ignore_eos=True))[0].text
    assert piece
    for _ in range(500):
        with engine._turns:
            if engine._is_idle():
                break
        asyncio.run(asyncio.sleep(0.01))
    assert_all_free(engine)


def test_a_stream_that_does_not_fit_is_an_error_of_its_own(model: Llama, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, cache_tokens=64, block_tokens=8)

    async def read(most: int) -> str:
        return "".join([piece async for piece in engine.stream("def f", max_tokens=most, ignore_eos=True)])

    async def both() -> list[str | BaseException]:
        return await asyncio.gather(read(300), read(20), return_exceptions=True)

    error, text = asyncio.run(both())
    assert isinstance(error, PunaError)
    assert "lower max_tokens" in str(error)
    tokens = tokenizer.encode("def f", bos=True)
    assert text == complete(model, tokenizer, [tokens], Sampling(max_tokens=20, ignore_eos=True))[0].text


def test_an_error_in_a_step_reaches_every_stream(model: Llama, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, cache_tokens=512)
    engine._runner.compute = lambda chunks: 1 / 0  # type: ignore

    async def read() -> None:
        async for _ in engine.stream("x"):
            pass

    with pytest.raises(ZeroDivisionError):
        asyncio.run(read())


def test_a_stream_whose_begin_fails_is_told_and_the_next_one_runs(
    model: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer, cache_tokens=256)

    async def read() -> str:
        return "".join([piece async for piece in engine.stream("def f", max_tokens=4)])

    def lost(_: object) -> str:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr("puna.generate.engine.engine.mark_in_memory", lost)
        with pytest.raises(RuntimeError, match="device lost"):
            asyncio.run(asyncio.wait_for(read(), 60))
    [expected] = engine.generate(["def f"], Sampling(max_tokens=4))
    assert asyncio.run(asyncio.wait_for(read(), 60)) == expected.text


@pytest.mark.parametrize("name", ["max_rows", "block_tokens", "cache_tokens"])
def test_an_engine_without_room_is_refused(model: Llama, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}=0 must be 1 or more"):
        Engine(model, **{"cache_tokens": 64, name: 0})


def test_what_cannot_be_served_is_refused_before_anything_runs(model: Llama) -> None:
    engine = Engine(model, cache_tokens=64, block_tokens=8)
    with pytest.raises(
        PunaError, match=r"prompt 1 may grow to 103 tokens, and the cache holds 64; lower max_tokens, .* in 8 bits"
    ):
        engine.generate([[1], [1, 2, 3]], [Sampling(max_tokens=9), Sampling(max_tokens=100)])
    with pytest.raises(OutgrowsCache) as refused:
        engine.generate([[1], [2], [3]], [Sampling(max_tokens=number) for number in (64, 63, 65)])
    assert list(refused.value.reasons) == [0, 2]
    with pytest.raises(PunaError, match="prompt 0 is empty"):
        engine.generate([[]], Sampling())
    with pytest.raises(UsageError, match="2 samplings for 1 prompts"):
        engine.generate([[1]], [Sampling(), Sampling()])
    with pytest.raises(UsageError, match="texts need a tokenizer"):
        engine.generate(["a"], Sampling())
    assert_all_free(engine)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 12))
def test_blocks_are_held_known_or_free_and_never_two_of_these(actions: list[int], n_blocks: int) -> None:
    pool = BlockPool(n_blocks, 2)
    held: list[list[int]] = []
    texts = [[1, 2, 3, 4], [1, 2, 9, 9], [7, 7]]
    for action in actions:
        if action < 3:
            text = texts[action]
            blocks = pool.find(text)
            try:
                while len(blocks) * 2 < len(text):
                    blocks.append(pool.take(blocks[-1] if blocks else None))
            except OutOfBlocks:
                assert pool.n_free == 0
            else:
                key = b""
                for i, block in enumerate(blocks):
                    key = key_of(key, text[2 * i : 2 * i + 2])
                    pool.remember(block, key)
            held.append(blocks)
        elif held:
            for block in held.pop(action % len(held)):
                pool.release(block)
    counts = [sum(blocks.count(block) for blocks in held) for block in range(n_blocks)]
    assert pool._holders == counts
    assert pool.n_free == counts.count(0)
    assert not set(pool._free) & set(pool._kept)


def test_what_is_known_longest_makes_room_and_is_known_anew_under_other_weights() -> None:
    pool = BlockPool(3, 1)
    keys = [key_of(ROOT, [id]) for id in range(3)]
    blocks = [pool.take() for _ in keys]
    for block, key in zip(blocks, keys, strict=True):
        pool.remember(block, key)
        pool.release(block)
    assert pool.take() == blocks[0], "the oldest"
    assert (pool.find([0]), pool.find([1]), pool.find([2])) == ([], blocks[1:2], blocks[2:])
    pool.forget()
    assert pool.find([1]) == []
    pool.remember(blocks[1], key_of(ROOT, [7]))
    assert pool.find([7]) == blocks[1:2]


def test_of_a_text_that_is_no_longer_held_the_end_makes_room_first(model: Llama) -> None:
    prompt = [1, *range(3, 20)]
    engine = Engine(model, cache_tokens=24, block_tokens=8)
    engine.generate([prompt], Sampling(max_tokens=1, ignore_eos=True))
    assert engine.pool.n_free == 3
    engine.pool.take(), engine.pool.take()  # one that knows nothing, and one of the two that do
    assert len(engine.pool.find(prompt)) == 1


def test_sequences_begin_far_apart_and_grow_into_neighbours() -> None:
    pool = BlockPool(50, 2)
    first = [pool.take() for _ in range(4)]
    assert first == [0, 32, 16, 48]
    for block in first[:3]:
        for after in range(block, block + 15):
            assert pool.take(after) == after + 1
    assert pool.take() == 49, "the only one that is free"
    with pytest.raises(OutOfBlocks):
        pool.take()


def test_sampled_tokens_follow_the_distribution_with_guesses_as_without(model: Llama) -> None:
    """Chi-squared over the third token of those of 1,000 completions, each with a seed of its own, that begin alike.

    Lookup guesses behind 9, and so does the draft, which guesses 140 and what follows it.
    """
    prompt, beginning = [7, 8, 9, 7, 8, 9, 7, 8], [9, 140]
    samplings = [Sampling(max_tokens=4, temperature=0.3, seed=seed, ignore_eos=True) for seed in range(1000)]
    found = Engine(model, max_rows=64, cache_tokens=4096).generate([prompt] * 1000, samplings)
    for guessing in ({}, {"lookup": True}, {"draft": model}):
        for draws in (False, True):
            engine = Engine(model, max_rows=64, cache_tokens=4096, **guessing)
            engine._draws = draws
            assert engine.generate([prompt] * 100, samplings[:100]) == found[:100]
    third = torch.tensor([c.tokens[2] for c in found if c.tokens[:2] == beginning])
    counts = torch.bincount(third, minlength=512).double()
    with torch.inference_mode():
        expected = (model(torch.tensor([prompt + beginning]))[0, -1].double() / 0.3).softmax(0) * len(third)
    likely = expected >= 5
    squares = ((counts - expected).square() / expected)[likely].sum()
    squares += (counts[~likely].sum() - expected[~likely].sum()).square() / expected[~likely].sum()
    freedom = int(likely.sum())
    assert freedom >= 4
    assert squares < freedom + 5 * (2 * freedom) ** 0.5


class EagerGraph:
    """Computes a step anew where a CUDA graph would be replayed."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.step, self.logits = step, step()

    def replay(self) -> None:
        """Leaves the logits where the step left its first ones."""
        self.logits.copy_(self.step())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[EagerGraph]:
    """Engines made from now on record steps as they would on a CUDA device, to here."""
    recorded: list[EagerGraph] = []

    def capture(self: DecodeGraphs, step: Callable[[], Tensor]) -> tuple[EagerGraph, Tensor]:
        recorded.append(EagerGraph(step))
        return recorded[-1], recorded[-1].logits

    for module in ("runner", "network", "cache"):
        monkeypatch.setattr(f"puna.generate.engine.{module}.takes_cuda_kernels", lambda kind: True)
    for module in ("cache", "graphs"):
        monkeypatch.setattr(f"puna.generate.engine.{module}.most_tokens", lambda keys: MOST_TOKENS)
    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    return recorded


@pytest.mark.parametrize(
    "options",
    [{}, {"draft": tiny_model()}, {"lookup": True}, {"cache_dtype": "int8"}],
    ids=["plain", "draft", "lookup", "int8"],
)
def test_recorded_steps_of_rounded_sizes_give_the_tokens_of_others(
    model: Llama, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    prompts = [[1, *list(range(5 + n, 5 + 2 * n)) * 2] for n in (1, 20, 7, 45, 3)]
    samplings = [Sampling(max_tokens=9 + 5 * i, ignore_eos=True) for i in range(len(prompts))]
    expected = complete(model, None, prompts, samplings)
    if "cache_dtype" in options:
        expected = Engine(model, cache_tokens=600, **options).generate(prompts, samplings)
    recorded = request.getfixturevalue("recorded")
    engine = Engine(model, cache_tokens=600, block_tokens=4, max_rows=4, **options)
    steps = []
    step_of = Step.of
    monkeypatch.setattr(Step, "of", lambda *inputs: steps.append(step_of(*inputs)) or steps[-1])
    assert engine.generate(prompts, samplings) == expected
    assert len(recorded) > 3, "several numbers of rows and blocks"
    assert any(len(seen.spans) > 1 for step in steps for seen in step.others), "prompts are attended to together"
    is_guessing = "draft" in options or "lookup" in options
    assert any(has_several for *_, has_several in engine._runner._graphs._graphs) or not is_guessing
    assert any(step.firsts is not None and step.others for step in steps) or not is_guessing, "beside a prompt as well"
    assert_all_free(engine)


def test_a_prompt_alone_is_attended_to_on_a_cuda_device_as_some_together(
    model: Llama, recorded: list[EagerGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch takes for whole texts there is planned anew for each length."""
    prompt, sampling = [1, *range(5, 75)], Sampling(max_tokens=4, ignore_eos=True)
    monkeypatch.setattr("puna.generate.engine.cache.attend", None)
    engine = Engine(model, cache_tokens=128)
    assert engine.generate([prompt], sampling) == complete(model, None, [prompt], sampling)


@pytest.fixture
def cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What records steps finds of torch's what it needs; the streams that steps ran on come here."""
    streams: list[Any] = []
    fakes = {"Stream": MagicMock, "current_stream": MagicMock, "CUDAGraph": MagicMock, "graph_pool_handle": MagicMock}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def on(stream: Any) -> contextlib.nullcontext[None]:
        streams.append(stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, *, pool, stream: on(stream))
    return streams


def test_nothing_is_collected_while_a_step_is_recorded(model: Llama, cuda_without_a_device: list[Any]) -> None:
    """A graph that is given up meanwhile spoils the one that is recorded, and torch leaves it to us."""
    seen: list[bool] = []
    graphs = DecodeGraphs(ByModules(model), Engine(model, cache_tokens=64)._runner.cache)
    graphs._capture(lambda: seen.append(gc.isenabled()))  # type: ignore[arg-type, return-value]
    assert seen == [True, True, False]
    assert gc.isenabled()


def test_all_steps_are_tried_and_recorded_on_one_stream(model: Llama, cuda_without_a_device: list[Any]) -> None:
    """For each stream, cuBLAS takes memory that is never given back."""
    graphs = DecodeGraphs(ByModules(model), Engine(model, cache_tokens=64)._runner.cache)
    for _ in range(2):
        graphs._capture(lambda: None)  # type: ignore[arg-type, return-value]
    assert len(cuda_without_a_device) == 4
    assert len(set(cuda_without_a_device)) == 1


def test_layers_are_compiled_for_one_row_and_once_for_all_other_numbers(
    recorded: list[EagerGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made, compile_ = tiny_model(), [], torch.compile

    def note(graph, inputs):  # type: ignore[no-untyped-def]
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, options: compile_(function, backend=note))
    torch.compiler.reset()  # it remembers sizes by the line that they came from
    prompts = [[1, *range(5, 5 + n)] for n in (1, 40, 7, 90, 3)]
    samplings = [Sampling(max_tokens=9 + 5 * i, ignore_eos=True) for i in range(len(prompts))]
    expected = complete(model, None, prompts, samplings)
    engine = Engine(model, cache_tokens=400, block_tokens=4, max_rows=5, compile=True)
    for_one_row = len(made)
    assert engine.generate(prompts, samplings) == expected
    assert len(recorded) > 3, "several numbers of rows"
    assert len(made) == 2 * for_one_row > 0


@torch.no_grad()
def test_in_bf16_packed_layers_choose_what_is_likeliest_in_fp32_or_nearly_so() -> None:
    exact, packed = (tiny_model(head_dim=64).bfloat16() for _ in range(2))
    pack_layers(packed)
    prompts = [[1, *range(5, 5 + n)] for n in (1, 40, 7, 90, 3)]
    engine = Engine(packed, cache_tokens=2000, block_tokens=16, max_rows=4, step_tokens=33)
    completions = engine.generate(prompts, Sampling(max_tokens=40, ignore_eos=True))
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = exact.float()(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 : -1]
        lost = logits.amax(-1) - logits.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert (lost == 0).float().mean() > 0.8
        assert lost.max() < 0.2 * logits.std()
    assert_all_free(engine)


@pytest.mark.parametrize("fails", ["compute", "draw"])
def test_memory_that_runs_out_in_a_step_is_said_with_what_takes_less(
    model: Llama, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    engine = Engine(model, cache_tokens=160)
    engine._draws = True
    owner, name = (engine._runner, "compute") if fails == "compute" else (engine_module, "draw")
    monkeypatch.setattr(owner, name, MagicMock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(PunaError, match=r"ran out in a step of 2 tokens, .* a cache of 160; run fewer .*batch_rows"):
        engine.generate([[1, 2]], Sampling(temperature=1.0))
    assert_all_free(engine)


def test_a_step_makes_the_models_device_the_current_one(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, seen = Engine(model, max_rows=1, cache_tokens=64)._runner, []

    @contextlib.contextmanager
    def device_index(index: int | None) -> Iterator[None]:
        seen.append(index)
        yield
        seen.append("left")

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(runner, "_device", torch.device("cuda", 1))
    monkeypatch.setattr(runner, "_compute", lambda chunks: seen.append("computes"))
    runner.compute([])
    assert seen == [1, "computes", "left"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("is_compiled", "guesses"), [(False, None), (False, "lookup"), (False, "draft"), (True, "draft")]
)
def test_on_a_gpu_it_gives_the_tokens_of_the_loop(is_compiled: bool, guesses: str | None) -> None:
    model = tiny_model(head_dim=64).cuda()
    draft = tiny_model(head_dim=64).cuda() if guesses == "draft" else None
    prompts = [[1, *list(range(5 + n, 5 + 2 * n)) * 2] for n in (1, 20, 7, 45, 3)] * 2
    samplings = [
        Sampling(max_tokens=9 + 5 * i, ignore_eos=True, temperature=0.8 * (i % 3 == 2), top_p=0.9, seed=i)
        for i in range(len(prompts))
    ]
    engine = Engine(
        model, cache_tokens=2000, block_tokens=16, max_rows=7, step_tokens=120, compile=is_compiled, draft=draft,
        lookup=guesses == "lookup",
    )  # fmt: skip
    found = engine.generate(prompts, samplings)
    for one, other in zip(found, complete(model, None, prompts, samplings), strict=True):
        assert one.tokens == other.tokens
    assert_all_free(engine)


def test_log_probabilities_are_those_of_the_model(model: Llama) -> None:
    prompt = [1, 20, 30]
    settings = [Sampling(max_tokens=5, temperature=t, seed=3, logprobs=4, ignore_eos=True) for t in (0.0, 0.9)]
    for completion in Engine(model, cache_tokens=128).generate([prompt] * 2, settings):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for place, (id, found) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
            assert found.chosen == pytest.approx(expected[place, id].item(), abs=1e-5)
            best = expected[place].topk(4)
            assert list(found.likeliest) == best.indices.tolist()
            assert list(found.likeliest.values()) == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_token_that_ends_a_completion_has_no_log_probabilities(model: Llama) -> None:
    [whole] = complete(model, None, [[1, 5]], Sampling(max_tokens=6, ignore_eos=True))
    at = next(place for place, id in enumerate(whole.tokens) if place and id not in whole.tokens[:place])
    sampling = Sampling(max_tokens=6, ignore_eos=True, stop_ids=(whole.tokens[at],), logprobs=1)
    [found] = Engine(model, cache_tokens=64).generate([[1, 5]], sampling)
    assert (found.finish, found.tokens) == ("stop", whole.tokens[:at])
    assert len(found.logprobs) == at


def test_more_log_probabilities_than_there_are_ids_are_all_of_them(model: Llama) -> None:
    (found,) = complete(model, None, [[1]], Sampling(max_tokens=1, ignore_eos=True, logprobs=10_000))
    assert sorted(found.logprobs[0].likeliest) == list(range(model.config.vocab_size))


def test_prompts_that_begin_alike_are_read_once(model: Llama) -> None:
    engine = Engine(model, cache_tokens=512, block_tokens=8, step_tokens=200)
    settings = Sampling(max_tokens=4, ignore_eos=True)
    added = [engine._new(engine._sequence(i, range(3, 43), settings, None)) for i in range(6)]
    for running in added:
        engine.scheduler.add(running)
    computed = 0
    while not all(running.is_done for running in added):
        chunks = engine.scheduler.next_step()
        computed += sum(chunk.stop - chunk.start for chunk in chunks)
        for chunk, logits in zip(chunks, engine._runner.compute(chunks), strict=True):
            if logits is not None:
                engine._take(chunk, logits)
            engine.scheduler.advance(chunk)
    assert computed == 40 + 5 * 8 + 6 * 3, "one reads the prompt, five its last block, and all decode"
    assert len({tuple(running.tokens) for running in added}) == 1


@pytest.mark.slow
def test_a_prompt_of_100000_tokens_is_read_in_bounded_memory() -> None:
    model = tiny_model(max_position_embeddings=1 << 17, num_hidden_layers=1)
    prompt = torch.randint(3, 512, (100_000,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Engine(model, cache_tokens=100_064, step_tokens=512)
    engine._runner.cache.zero()  # its pages are there before the watch begins
    with PeakAnonymousMemory() as peak:
        (found,) = engine.generate([prompt], Sampling(max_tokens=1, ignore_eos=True, logprobs=5))
    assert peak.grown_bytes < 500e6, "scores of a chunk, never of the whole square"
    with torch.inference_mode():
        best = model.lm_head(model.hidden(torch.tensor([prompt]))[0, -1]).log_softmax(0).topk(5)
    (logprobs,) = found.logprobs
    assert found.tokens == best.indices[:1].tolist()
    assert list(logprobs.likeliest.values()) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_running_is_a_sequence_of_its_own() -> None:
    """Two requests of equal content are two requests."""
    config = tiny_model().config
    one, other = (Running(Sequence(0, [1], Sampling(), config, None)) for _ in range(2))
    assert one != other


@pytest.mark.parametrize("asks", ["generate", "stream"])
def test_who_comes_while_generate_runs_takes_part_and_is_told_of_the_end(
    model: Llama, tokenizer: Tokenizer, asks: str
) -> None:
    engine = Engine(model, tokenizer, cache_tokens=2048, block_tokens=8)
    (expected,) = engine.generate(["def f"], Sampling(max_tokens=9))
    read: list[str] = []

    async def stream() -> None:
        read.append("".join([piece async for piece in engine.stream("def f", max_tokens=9)]))

    def ask() -> None:
        if asks == "stream":
            asyncio.run(stream())
        else:
            read.extend(found.text for found in engine.generate("def f", Sampling(max_tokens=9)))

    def on_text(_: int, text: str) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 1:
            asker.start()
            while not engine._incoming:
                time.sleep(0.001)
        if pieces == 50:
            asker.join(10)
            assert read == [expected.text]

    pieces, asker = 0, threading.Thread(target=ask, daemon=True)
    engine.generate(["import"], Sampling(max_tokens=200, ignore_eos=True), on_text=on_text)
    assert pieces > 50


def test_who_is_refused_while_generate_runs_hears_of_it_at_once(model: Llama, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, cache_tokens=512, block_tokens=8)
    refused: list[str] = []

    def ask() -> None:
        try:
            engine.generate([[1]], Sampling(max_tokens=600))
        except PunaError as error:
            refused.append(str(error))

    def on_text(_: int, text: str) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 1:
            asker.start()
            while not engine._incoming:
                time.sleep(0.001)
        if pieces == 50:
            asker.join(10)
            assert "lower max_tokens" in refused[0]

    pieces, asker = 0, threading.Thread(target=ask, daemon=True)
    engine.generate([[1, 5]], Sampling(max_tokens=200, ignore_eos=True), on_text=on_text)
    assert pieces > 50


def test_threads_that_ask_at_once_get_what_each_would_get_alone(model: Llama, tokenizer: Tokenizer) -> None:
    """Some leave amid their texts, some meet errors of their own, and nobody else notices."""
    engine = Engine(model, tokenizer, cache_tokens=600, block_tokens=8)  # too few for all: some wait
    prompts = [[1, id, id + 1] for id in range(3, 27)]
    sampling = Sampling(max_tokens=60, ignore_eos=True)
    expected = complete(model, tokenizer, prompts, sampling)

    async def beginning(prompt: list[int]) -> str:
        async for piece in engine.stream(prompt, max_tokens=60, ignore_eos=True):
            return piece
        return ""

    def refuse(_: int, text: str) -> None:
        raise ValueError(text)

    def ask(number: int) -> object:
        mine = [prompts[number], prompts[-1 - number]]
        match number % 3:
            case 0:
                return engine.generate(mine, sampling)
            case 1:
                return asyncio.run(beginning(mine[0]))
            case _:
                with pytest.raises(ValueError, match=r"."):
                    engine.generate(mine, sampling, on_text=refuse)
                return None

    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(ask, range(12)))
    for number, what in enumerate(found):
        if number % 3 == 0:
            assert what == [expected[number], expected[-1 - number]]
        elif number % 3 == 1:
            assert isinstance(what, str)
            assert expected[number].text.startswith(what)
    while engine._thread is not None:
        time.sleep(0.001)
    assert_all_free(engine)


def test_a_completion_may_lead_to_the_next_prompt_and_a_piece_of_text_may_not(
    model: Llama, tokenizer: Tokenizer
) -> None:
    engine, sampling = Engine(model, tokenizer, cache_tokens=256), Sampling(max_tokens=4, ignore_eos=True)
    [expected] = engine.generate("def f", sampling)
    found: list[Completion] = []
    engine.generate("import", sampling, on_completion=lambda *_: found.extend(engine.generate("def f", sampling)))
    assert found == [expected]
    with pytest.raises(UsageError, match="on_text cannot ask the engine that calls it"):
        engine.generate("import", sampling, on_text=lambda *_: found.extend(engine.generate("def f", sampling)))
    assert engine.generate("def f", sampling) == [expected]


def test_a_stream_ends_with_the_completion_where_it_is_asked_for(model: Llama, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, cache_tokens=256)
    told: list[tuple[int, Completion]] = []

    async def read() -> str:
        pieces = engine.stream("def f", max_tokens=4, logprobs=2, on_completion=lambda *those: told.append(those))
        return "".join([piece async for piece in pieces])

    text = asyncio.run(read())
    assert told == list(enumerate(engine.generate("def f", Sampling(max_tokens=4, logprobs=2))))
    assert told[0][1].text == text
    assert len(told[0][1].logprobs) == len(told[0][1].tokens) > 0


@pytest.mark.parametrize("has_draft", [False, True])
def test_an_error_in_a_text_of_one_leaves_the_others_as_they_are(
    model: Llama, tokenizer: Tokenizer, has_draft: bool
) -> None:
    prompts, sampling = [[1, 5, 6, 5, 6], [1, 7]], Sampling(max_tokens=40, ignore_eos=True)
    expected = complete(model, tokenizer, prompts, sampling)
    guesses = {"draft": model} if has_draft else {"lookup": True}
    engine = Engine(model, tokenizer, cache_tokens=1024, block_tokens=1, **guesses)
    told: list[Running] = []
    others = [engine._new(engine._sequence(0, prompt, sampling, None), told.append) for prompt in prompts]

    def on_text(_: int, text: str) -> None:
        if not engine._incoming and not others[0].blocks:
            engine._incoming.append(others)
        if any(other.drafts for other in others):  # in a step that the others have not been told of yet
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, id] for id in range(9, 15)], Sampling(max_tokens=99, ignore_eos=True), on_text=on_text)
    while not engine.scheduler.is_idle:
        engine._step()
    assert [other.sequence.completion() for other in others] == expected
    assert [one.error for one in told] == [None, None]
    assert_all_free(engine)


def test_sequences_that_wait_or_have_ended_hold_nothing_of_the_vocabularys_size() -> None:
    config = tiny_model(vocab_size=32_000).config
    sampling = Sampling(max_tokens=1, temperature=1.0, frequency_penalty=0.1)
    logits = torch.zeros(config.vocab_size)
    with PeakAnonymousMemory() as peak:
        sequences = [Sequence(0, [1], sampling, config, None) for _ in range(1000)]
        for sequence in sequences:
            sequence.take(logits)
    assert all(sequence.finish == "length" for sequence in sequences)
    assert peak.grown_bytes < 30e6, "with what they choose by, each would hold 160 kB"
