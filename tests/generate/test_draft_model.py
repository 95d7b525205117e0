"""Guesses of a small model: what it would say by itself, and never a change of what the large one says."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import puna
from puna.errors import UsageError
from puna.generate import Sampling, complete
from puna.generate.engine import Engine, draft_model
from puna.generate.engine.draft_model import FIRST, MOST, DraftModel
from puna.model.llama import Llama
from puna.testing import tiny_model

PROMPT = [1, 17, 203, 44]


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model()


@pytest.fixture(scope="module")
def other() -> Llama:
    return tiny_model(seed=7)


def steps_of(engine: Engine, prompt: list[int], sampling: Sampling) -> tuple[int, list[int]]:
    running = engine._new(engine._sequence(0, prompt, sampling, None))
    engine.scheduler.add(running)
    steps = 0
    while not running.is_done:
        engine._step()
        steps += 1
    assert engine.pool.n_free == engine.pool.n_blocks
    assert running.drafter is None, "its cache is given back with the blocks"
    return steps, running.tokens[len(prompt) :]


def greedy(model: Llama, tokens: list[int], n: int) -> list[int]:
    return complete(model, None, [tokens], Sampling(max_tokens=n, ignore_eos=True))[0].tokens


def test_a_draft_that_is_right_gives_all_its_guesses_and_one_token_more_a_step(model: Llama) -> None:
    sampling = Sampling(max_tokens=100, ignore_eos=True)
    steps, tokens = steps_of(Engine(model, draft=model, cache_tokens=256), PROMPT, sampling)
    lengths = [1]  # the prompt's own step
    while sum(lengths) < 100:
        lengths.append(1 + min(MOST, FIRST + 2 * (len(lengths) - 1)))
    assert steps == len(lengths) == 9
    assert tokens == greedy(model, PROMPT, 100)


def test_a_draft_that_is_wrong_costs_steps_and_changes_nothing(model: Llama, other: Llama) -> None:
    sampling = Sampling(max_tokens=60, ignore_eos=True)
    steps, tokens = steps_of(Engine(model, draft=other, cache_tokens=256), PROMPT, sampling)
    assert tokens == greedy(model, PROMPT, 60)
    assert steps > 40


@settings(max_examples=25)
@given(
    prompts=st.lists(st.lists(st.integers(3, 511), min_size=1, max_size=20), min_size=1, max_size=5),
    temperature=st.sampled_from([0.0, 0.8]),
    is_twin=st.booleans(),
    n_tokens=st.integers(64, 128),
    max_rows=st.integers(1, 4),
)
def test_completions_are_those_of_the_plain_loop(
    model: Llama, other: Llama, prompts, temperature: float, is_twin: bool, n_tokens: int, max_rows: int
) -> None:
    samplings = [Sampling(max_tokens=10 + 5 * i, temperature=temperature, seed=i) for i in range(len(prompts))]
    engine = Engine(model, draft=model if is_twin else other, cache_tokens=n_tokens, block_tokens=4, max_rows=max_rows)
    assert engine.generate(prompts, samplings) == complete(model, None, prompts, samplings)
    assert engine.pool.n_free == engine.pool.n_blocks


def test_guesses_are_what_the_draft_says_by_itself(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_model, "SMALLEST_CACHE", 4)
    monkeypatch.setattr(draft_model, "CHUNK_TOKENS", 3)
    drafter = DraftModel(model, 512)
    text = [*PROMPT, 9, 8, 7]
    for right in (5, 0, 2, 3, 1):  # how many of its guesses the text goes on with
        guesses = drafter.guess(text, 5)
        assert guesses == greedy(model, text, 5)
        text = [*text, *guesses[:right], 1 + guesses[right - 1]]
    assert drafter.guess(text, 2) == greedy(model, text, 2)
    assert drafter.guess([*text, 30, 31, 32], 2) == greedy(model, [*text, 30, 31, 32], 2), "it fell behind"


def test_only_what_is_new_is_computed(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, **rest: seen.append(ids.shape[1]) or hidden(ids, **rest))
    drafter = DraftModel(model, 512)
    text = list(range(3, 30))
    guesses = drafter.guess(text, 3)
    drafter.guess([*text, *guesses[:2], 400], 2)
    assert seen == [27, 1, 1, 1, 1], "the two that were right are in the cache"


def test_the_number_of_guesses_follows_how_many_were_right(model: Llama) -> None:
    drafter = DraftModel(model, 512)
    assert len(drafter.guess(PROMPT, 99)) == FIRST
    drafter.learn(FIRST, FIRST)
    assert len(drafter.guess(PROMPT, 99)) == FIRST + 2
    assert len(drafter.guess(PROMPT, 3)) == 3
    assert drafter.guess(PROMPT, 0) == []
    for _ in range(20):
        drafter.learn(1, 0)
    assert len(drafter.guess(PROMPT, 99)) == 1
    drafter.learn(0, 0)
    assert len(drafter.guess(PROMPT, 99)) == 1
    for _ in range(20):
        drafter.learn(1, 1)
    assert len(drafter.guess(PROMPT, 99)) == MOST


def test_ids_that_one_of_both_does_not_know_are_not_guessed(model: Llama) -> None:
    narrow = tiny_model(vocab_size=300)
    all_guesses = {id for start in range(40) for id in DraftModel(model, 300).guess([1, start], 5)}
    assert max(all_guesses) < 300
    assert max(id for start in range(40) for id in DraftModel(model, 512).guess([1, start], 5)) >= 300
    assert len(DraftModel(narrow, 512).guess([1, 299], 5)) == 5
    assert DraftModel(narrow, 512).guess([1, 300], 5) == []
    for large, small in ((narrow, model), (model, narrow)):
        _, tokens = steps_of(Engine(large, draft=small, cache_tokens=64), PROMPT, Sampling(max_tokens=20))
        assert tokens == complete(large, None, [PROMPT], Sampling(max_tokens=20))[0].tokens


def test_a_text_beyond_the_drafts_context_goes_on_without_guesses(model: Llama) -> None:
    short = tiny_model(max_position_embeddings=16)
    assert len(DraftModel(short, 512).guess([1] * 13, 9)) == 3
    assert DraftModel(short, 512).guess([1] * 16, 9) == []
    _, tokens = steps_of(Engine(model, draft=short, cache_tokens=64), PROMPT, Sampling(max_tokens=40, ignore_eos=True))
    assert tokens == greedy(model, PROMPT, 40)


def test_guesses_come_from_one_source(model: Llama) -> None:
    with pytest.raises(UsageError, match="give lookup or a draft model, not both"):
        Engine(model, lookup=True, draft=model)


def test_memory_is_shared_with_the_drafts_caches(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.generate.engine.engine.free_memory_bytes", lambda _: 10_000_000)
    alone, shared = (Engine(model, draft=draft) for draft in (None, model))
    drafter = DraftModel(model, 512)
    drafter.guess([1] * 300, 5)
    assert drafter._cache is not None
    paged_bytes = alone.cache.keys.nbytes // (alone.pool.n_blocks + 1) // shared.pool.size * 2
    draft_bytes = 2 * drafter._cache.keys.nbytes / 300
    assert shared.pool.n_blocks / alone.pool.n_blocks == pytest.approx(
        paged_bytes / (paged_bytes + draft_bytes), rel=0.05
    )


def test_a_draft_of_another_dtype_guesses_too(model: Llama) -> None:
    half = tiny_model().to(torch.bfloat16)
    steps, tokens = steps_of(
        Engine(model, draft=half, cache_tokens=64), PROMPT, Sampling(max_tokens=30, ignore_eos=True)
    )
    assert tokens == greedy(model, PROMPT, 30)
    assert steps < 20


def test_texts_go_on_the_same_with_a_draft(tiny_model_folder: Path, other: Llama) -> None:
    model, tokenizer = puna.load(tiny_model_folder)
    prompts, settings = ["def f(x):", "import"], {"max_tokens": 20, "temperature": 0.7, "n": 2}
    plain = puna.generate(model, tokenizer, prompts, **settings)
    assert puna.generate(model, tokenizer, prompts, draft=other, **settings) == plain
    assert puna.generate(model, tokenizer, prompts, draft=model, **settings) == plain
