"""Guesses of a small model: what it would say by itself, and never a change of what the large one says."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import puna
from puna.errors import UsageError
from puna.generate import Sampling, complete
from puna.generate.engine import Engine
from puna.generate.engine.draft_model import DraftModel
from puna.generate.engine.engine import STEP_TOKENS
from puna.generate.engine.scheduler import Running
from puna.generate.sequence import Sequence
from puna.model.llama import Llama
from puna.testing import tiny_model

PROMPT = [1, 17, 203, 44]


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model()


@pytest.fixture(scope="module")
def other() -> Llama:
    return tiny_model(seed=7)


@pytest.fixture(scope="module")
def precise_other() -> Llama:
    return tiny_model(seed=7).double()


def steps_of(engine: Engine, prompt: list[int], sampling: Sampling) -> tuple[int, list[int]]:
    running = engine._new(engine._sequence(0, prompt, sampling, None))
    engine.scheduler.add(running)
    steps = 0
    while not running.is_done:
        engine._step()
        steps += 1
    assert engine.pool.n_free == engine.pool.n_blocks
    return steps, running.tokens[len(prompt) :]


def greedy(model: Llama, tokens: list[int], n: int) -> list[int]:
    return complete(model, None, [tokens], Sampling(max_tokens=n, ignore_eos=True))[0].tokens


def test_a_draft_that_is_right_gives_all_its_guesses_and_one_token_more_a_step(model: Llama) -> None:
    sampling = Sampling(max_tokens=100, ignore_eos=True)
    steps, tokens = steps_of(Engine(model, draft=model, cache_tokens=256), PROMPT, sampling)
    lengths = [1]  # the prompt's own step
    while sum(lengths) < 100:
        lengths.append(1 + min(16, 5 + 2 * (len(lengths) - 1)))
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
    precise_model: Llama, precise_other: Llama, prompts, temperature: float, is_twin: bool, n_tokens: int, max_rows: int
) -> None:
    samplings = [Sampling(max_tokens=10 + 5 * i, temperature=temperature, seed=i) for i in range(len(prompts))]
    model, draft = precise_model, precise_model if is_twin else precise_other
    engine = Engine(model, draft=draft, cache_tokens=n_tokens, block_tokens=4, max_rows=max_rows)
    assert engine.generate(prompts, samplings) == complete(model, None, prompts, samplings)
    assert engine.pool.n_free == engine.pool.n_blocks


class Drafting:
    """A draft model and texts that grow as if a large model were there; block i holds the tokens of text i."""

    def __init__(self, model: Llama, *prompts: list[int], vocab_size: int = 512) -> None:
        self.drafter = DraftModel(model, vocab_size, n_blocks=len(prompts), block_tokens=64)
        config = tiny_model().config
        self.texts = [
            Running(Sequence(i, prompt, Sampling(), config, None), blocks=[i]) for i, prompt in enumerate(prompts)
        ]

    def guess(self, *most: int) -> list[list[int]]:
        """What is guessed behind each text."""
        for running in self.texts:
            running.drafts = []
            running.drafted = min(running.drafted, len(running.tokens) - 1)
        self.drafter.guess(list(zip(self.texts, most, strict=True)))
        return [running.drafts for running in self.texts]


def test_guesses_are_what_the_draft_says_by_itself(model: Llama) -> None:
    drafting = Drafting(model, PROMPT, [1, 9, 8, 7, 300, 301])
    for rights in ((5, 2), (0, 3), (2, 0), (3, 3), (1, 4)):  # how many of its guesses the texts go on with
        most = 5, 5 if rights[0] else 3
        found = drafting.guess(*most)
        assert found == [greedy(model, each.tokens, n) for each, n in zip(drafting.texts, most, strict=True)]
        for each, guesses, right in zip(drafting.texts, found, rights, strict=True):
            each.tokens.extend([*guesses[:right], 1 + guesses[right - 1]])
    drafting.texts[1].tokens.extend([30, 31, 32])
    assert drafting.guess(2, 0)[0] == greedy(model, drafting.texts[0].tokens, 2)
    assert drafting.guess(0, 2)[1] == greedy(model, drafting.texts[1].tokens, 2), "it fell behind"


def test_sequences_share_the_drafts_steps_and_only_what_is_new_is_computed(
    model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, **rest: seen.append(ids.shape[1]) or hidden(ids, **rest))
    drafting = Drafting(model, list(range(3, 30)), [5, 6], [7])
    first, second, third = drafting.guess(3, 2, 3)
    assert seen == [27 + 2 + 1, 3, 2]
    seen.clear()
    drafting.texts[0].tokens.extend([*first[:2], 400])
    drafting.texts[1].tokens.extend([*second, 401])
    drafting.texts[2].tokens.extend([1 + third[0]])
    drafting.guess(2, 1, 1)
    assert seen == [1 + 2 + 1, 1], "what was right is in the cache, but for the last guess"


def test_the_draft_reads_prompts_with_the_large_model(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = tiny_model()
    seen: list[int] = []
    hidden = draft.hidden
    monkeypatch.setattr(draft, "hidden", lambda ids, **rest: seen.append(ids.shape[1]) or hidden(ids, **rest))
    engine = Engine(model, draft=draft, cache_tokens=128, block_tokens=4, step_tokens=16, max_rows=2)
    prompt = [1, *range(40, 66)]
    settings = Sampling(max_tokens=4, ignore_eos=True)
    expected = complete(model, None, [prompt], settings)
    assert engine.generate([prompt], settings) == expected
    assert seen == [16, 11, 1, 1]
    seen.clear()
    assert engine.generate([prompt], settings) == expected
    assert seen == [3, 1, 1], "24 tokens, six blocks, were there"


def test_the_number_of_guesses_follows_how_many_were_right(model: Llama) -> None:
    length = DraftModel(model, 512, 1, 4)
    assert length.first == 5
    assert [length.next_length(5, 5, right) for right in (5, 4, 0)] == [7, 4, 4]
    assert length.next_length(5, 2, 2) == 7
    assert [length.next_length(16, 16, 16), length.next_length(1, 1, 0)] == [16, 1]


def test_ids_that_one_of_both_does_not_know_are_not_guessed(model: Llama) -> None:
    narrow = tiny_model(vocab_size=300)
    prompts = [[1, start] for start in range(40)]
    most = [5] * 40
    assert max(max(ids) for ids in Drafting(model, *prompts, vocab_size=300).guess(*most)) < 300
    assert max(max(ids) for ids in Drafting(model, *prompts).guess(*most)) >= 300
    assert [len(ids) for ids in Drafting(narrow, [1, 299], [1, 300]).guess(5, 5)] == [5, 0]
    for large, small in ((narrow, model), (model, narrow)):
        _, tokens = steps_of(Engine(large, draft=small, cache_tokens=64), PROMPT, Sampling(max_tokens=20))
        assert tokens == complete(large, None, [PROMPT], Sampling(max_tokens=20))[0].tokens


def test_a_text_beyond_the_drafts_context_goes_on_without_guesses(model: Llama) -> None:
    short = tiny_model(max_position_embeddings=16)
    assert [len(ids) for ids in Drafting(short, [1] * 13, [1] * 16, [1] * 40).guess(9, 9, 9)] == [3, 0, 0]
    _, tokens = steps_of(Engine(model, draft=short, cache_tokens=64), PROMPT, Sampling(max_tokens=40, ignore_eos=True))
    assert tokens == greedy(model, PROMPT, 40)


def test_guesses_never_keep_another_sequence_from_its_next_token(model: Llama) -> None:
    prompts = [[1, 5 + i, 9] for i in range(3)]
    engine = Engine(model, draft=model, cache_tokens=80, block_tokens=4, max_rows=3, step_tokens=10)
    settings = Sampling(max_tokens=20, ignore_eos=True)
    added = [engine._new(engine._sequence(i, prompt, settings, None)) for i, prompt in enumerate(prompts)]
    for running in added:
        engine.scheduler.add(running)
    engine._step()
    while live := [running for running in added if not running.is_done]:
        lengths = [len(running.tokens) for running in live]
        engine._step()
        assert all(len(running.tokens) > length for running, length in zip(live, lengths, strict=True))
    assert [running.tokens[3:] for running in added] == [greedy(model, prompt, 20) for prompt in prompts]


def test_guesses_come_from_one_source(model: Llama) -> None:
    with pytest.raises(UsageError, match="give lookup or a draft model, not both"):
        Engine(model, lookup=True, draft=model)


def test_memory_is_shared_with_the_drafts_cache(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.generate.engine.engine.free_memory_bytes", lambda _: 10_000_000)
    small = tiny_model(num_hidden_layers=1)
    alone, shared = (Engine(model, draft=draft) for draft in (None, small))
    assert isinstance(shared._drafter, DraftModel)
    caches = [shared._runner.cache, shared._drafter._runner.cache]
    block_bytes = [2 * cache.keys.nbytes / (shared.pool.n_blocks + 1) for cache in caches]
    assert block_bytes[0] == model.config.num_hidden_layers * block_bytes[1]
    step = STEP_TOKENS["cpu"] * 4 * (4 * model.config.intermediate_size + 3 * model.config.hidden_size)
    for engine, size in ((alone, block_bytes[0]), (shared, sum(block_bytes))):
        assert size * engine.pool.n_blocks == pytest.approx(0.3 * (10_000_000 - step), abs=size)


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
