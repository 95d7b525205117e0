"""Perplexity by position and key retrieval, against plain formulas and models that know the answer."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.errors import PunaError, UsageError
from puna.evaluate import evaluate
from puna.evaluate.benchmarks import key_retrieval
from puna.evaluate.benchmarks.key_retrieval import is_found, prompt
from puna.evaluate.benchmarks.perplexity import spans
from puna.evaluate.completing import Ask
from puna.testing import tiny_model


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path) -> tuple[Any, Any]:
    return puna.load(tiny_model_folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for i in range(3):
        (tmp_path / f"long{i}.py").write_text("".join(f"variable_{j} = {i * j}\n" for j in range(200)))
    (tmp_path / "short.py").write_text("x = 1\ny = 2\n")
    return tmp_path


def test_spans_hold_every_position_but_that_of_bos_once() -> None:
    for length in (2, 255, 256, 257, 1000, 1024, 5000):
        positions = [position for start, stop in spans(length) for position in range(start, stop)]
        assert positions == list(range(1, length))
    assert spans(1024) == [(1, 256), (256, 512), (512, 1024)]


def test_perplexity_is_that_of_the_tokens_at_those_positions(loaded: tuple[Any, Any], corpus: Path) -> None:
    model, tokenizer = loaded
    result = evaluate("perplexity", model, tokenizer=tokenizer, corpus=corpus, length=600)
    assert (result["documents"], result["length"]) == (3, 600)
    nats = torch.zeros(599, dtype=torch.float64)
    for i in range(3):
        tokens = torch.tensor([tokenizer.encode((corpus / f"long{i}.py").read_text(), bos=True)[:600]])
        log_p = torch.log_softmax(model(tokens).detach()[0].double(), -1)
        nats -= log_p[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    means = nats / 3
    spans = [(1, 255), (256, 511), (512, 599)]
    for found, (start, stop) in zip(result["by_position"], spans, strict=True):
        assert (found["from"], found["to"], found["tokens"]) == (start, stop, 3 * (stop - start + 1))
        assert found["perplexity"] == pytest.approx(math.exp(float(means[start - 1 : stop].mean())), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(float(means.mean())), rel=1e-5)


def test_a_model_that_computes_no_numbers_has_no_perplexity(loaded: tuple[Any, Any], corpus: Path) -> None:
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(PunaError, match="losses are not numbers: its weights are damaged, or too large"):
        evaluate("perplexity", model, tokenizer=tokenizer, corpus=corpus, length=16)


def test_by_default_it_reads_as_far_as_all_of_few_documents_reach(loaded: tuple[Any, Any], corpus: Path) -> None:
    model, tokenizer = loaded
    (corpus / "short.py").unlink()
    shortest = min(len(tokenizer.encode(path.read_text(), bos=True)) for path in corpus.glob("*.py"))
    result = evaluate("perplexity", model, tokenizer=tokenizer, corpus=corpus)
    assert result["length"] <= min(shortest, model.config.max_position_embeddings) < 2 * result["length"]


def test_lengths_that_nothing_has_are_refused(loaded: tuple[Any, Any], corpus: Path) -> None:
    _, tokenizer = loaded
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=100_000)
    with pytest.raises(PunaError, match=r"no document of .* has 90000 tokens; the longest has \d+"):
        evaluate("perplexity", model, tokenizer=tokenizer, corpus=corpus, length=90_000)
    with pytest.raises(UsageError, match="length=200000, but the model's context is 100000 tokens"):
        evaluate("perplexity", model, tokenizer=tokenizer, corpus=corpus, length=200_000)
    with pytest.raises(UsageError, match="perplexity needs files"):
        evaluate("perplexity", model, tokenizer=tokenizer)


# ---- key retrieval

LINES = [f"variable_{i} = {i}\n" for i in range(500)]


@pytest.mark.parametrize("position", [0.0, 0.2, 0.4, 1.0])
def test_the_key_stands_where_it_should_in_a_prompt_as_long_as_asked_for(
    loaded: tuple[Any, Any], position: float
) -> None:
    _, tokenizer = loaded
    text = prompt(tokenizer, LINES, 42, 700, position, "seed")
    longest_line = max(len(tokenizer.encode(line)) for line in LINES)
    assert 700 - longest_line - 5 <= len(tokenizer.encode(text, bos=True)) <= 700
    lines = text.split("\n")
    assert lines[-1] == "assert my_function() == "
    at = lines.index("    return 42")
    assert abs((at - 2) / (len(lines) - 4) - position) < 0.02
    assert text.count("my_function") == 2
    assert text == prompt(tokenizer, LINES, 42, 700, position, "seed")
    assert text != prompt(tokenizer, LINES, 42, 700, position, "other seed")


def test_too_little_code_and_too_little_room_are_refused(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    with pytest.raises(PunaError, match="not enough code for 700 tokens"):
        prompt(tokenizer, LINES[:10], 42, 700, 0.5, "")
    with pytest.raises(PunaError, match="10 tokens have no room for the key"):
        prompt(tokenizer, LINES, 42, 10, 0.5, "")


def test_the_answer_is_the_first_number() -> None:
    assert is_found(42, " 42")
    assert is_found(42, "42, 43")
    assert not is_found(42, "421")
    assert not is_found(42, "x = 42")
    assert not is_found(42, "")


def test_a_model_that_reads_finds_all_and_one_that_reads_half_finds_those(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, tokenizer = loaded

    class Reads:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __call__(self, asks: Sequence[Ask], **_: object) -> list[str]:
            return [self.key(ask.prefix) for ask in asks]

        def key(self, text: str) -> str:
            at = text.index("    return ", text.index("def my_function"))
            return text[at + 11 : at + 13] if at < self.reach * len(text) else "0"

        reach = 1.0

    monkeypatch.setattr(key_retrieval, "Completer", Reads)
    options: dict[str, Any] = {"tokenizer": tokenizer, "length": 500, "cases": 3, "batch": 2}
    result = evaluate("key_retrieval", model, output=tmp_path, **options)
    assert result["cells"] == {"500@0.0": 1.0, "500@0.2": 1.0, "500@0.4": 1.0}
    assert result["paper"]["7B"]["16000@0.0"] == 0.547
    assert (tmp_path / "result.json").exists()
    monkeypatch.setattr(Reads, "reach", 0.35)
    assert evaluate("key_retrieval", model, **options)["cells"] == {"500@0.0": 1.0, "500@0.2": 1.0, "500@0.4": 0.0}


def test_a_real_model_is_asked(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    result = evaluate("key_retrieval", model, tokenizer=tokenizer, length=300, cases=1)
    assert set(result["cells"]) == {"300@0.0", "300@0.2", "300@0.4"}
    with pytest.raises(UsageError, match="but the model's context is"):
        evaluate("key_retrieval", model, tokenizer=tokenizer, length=10**9)


def test_a_stored_model_is_asked_beyond_the_context_that_it_was_trained_on(tiny_model_folder: Path) -> None:
    result = evaluate("key_retrieval", str(tiny_model_folder), length=2100, cases=1)
    assert set(result["cells"]) == {"2100@0.0", "2100@0.2", "2100@0.4"}
