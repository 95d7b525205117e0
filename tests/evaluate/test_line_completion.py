"""Completion of unseen files: which lines, how alike, and how many bits, each against a plain formula."""

import gc
import itertools
import json
import math
import tracemalloc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import puna
from puna.data.documents import Document
from puna.errors import PunaError, UsageError
from puna.evaluate import evaluate
from puna.evaluate.benchmarks import completion
from puna.evaluate.benchmarks.completion import (
    LONGEST_BLOCK,
    LONGEST_LINE,
    choose_blocks,
    choose_cases,
    edit_similarity,
    levenshtein,
)
from puna.evaluate.completing import Ask
from puna.evaluate.corpus import choose_documents, read_documents
from puna.evaluate.likelihood import negative_log_likelihood, windows
from puna.testing import tiny_model, write_tiny_model

CODE = "import os\n\n\ndef place():\n    return os.getcwd()\n\n\nprint(place())\n"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return puna.load(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    for i in range(5):
        (folder / f"file{i}.py").write_text(CODE.replace("place", f"place{i}"))
    (folder / "again.py").write_text((folder / "file0.py").read_text())
    (folder / "notes.unknown").write_text("not code\n")
    return folder


# ---- the scores


def levenshtein_by_definition(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        levenshtein_by_definition(a[1:], b) + 1,
        levenshtein_by_definition(a, b[1:]) + 1,
        levenshtein_by_definition(a[1:], b[1:]) + (a[0] != b[0]),
    )


@settings(deadline=None)
@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_edit_distance_is_levenshteins(a: str, b: str) -> None:
    assert levenshtein(a, b) == levenshtein_by_definition(a, b)


def test_edit_similarity_runs_from_nothing_alike_to_equal() -> None:
    assert edit_similarity("return x", "return x") == 1
    assert edit_similarity("abc", "xyz") == 0
    assert edit_similarity("", "abcd") == 0
    assert edit_similarity("", "") == 1
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 12))
def test_windows_ask_for_every_token_but_the_first_once_and_never_show_more_than_fits(length: int, window: int) -> None:
    asked: list[int] = []
    for start, first, stop in windows(length, window):
        assert 0 <= start < first < stop <= length
        assert stop - 1 - start <= window
        assert start == 0 or first - start >= max(1, window // 2)
        asked += range(first, stop)
    assert asked == list(range(1, length))


def test_the_sum_over_windows_equals_a_slow_plain_formula() -> None:
    model = tiny_model(max_position_embeddings=2048)
    tokens = torch.randint(0, model.config.vocab_size, (27,), generator=torch.Generator().manual_seed(0)).tolist()
    for window in (8, 26, 100):
        plain = 0.0
        for start, first, stop in windows(len(tokens), window):
            for at in range(first, stop):
                logits = model(torch.tensor([tokens[start:at]])).detach()[0, -1].double()
                plain -= float(logits[tokens[at]] - torch.log(torch.exp(logits).sum()))
        assert negative_log_likelihood(model, tokens, window) == pytest.approx(plain, rel=1e-5)
    one = negative_log_likelihood(model, tokens, 100)
    assert one != pytest.approx(negative_log_likelihood(model, tokens, 8), rel=1e-4)


def test_logits_are_taken_in_chunks_without_changing_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model(), list(range(2, 40))
    whole = negative_log_likelihood(model, tokens, 100)
    monkeypatch.setattr("puna.evaluate.likelihood.CHUNK", 5)
    assert negative_log_likelihood(model, tokens, 100) == pytest.approx(whole, rel=1e-6)


def test_bits_per_byte_are_those_of_whole_documents(loaded: tuple[Any, Any], corpus: Path) -> None:
    model, tokenizer = loaded
    result = evaluate("completion", model, tokenizer=tokenizer, corpus=corpus, cases=1, max_tokens=1)
    nats, size_bytes = 0.0, 0
    for i in range(5):
        text = (corpus / f"file{i}.py").read_text()
        tokens = torch.tensor([tokenizer.encode(text, bos=True)])
        log_p = torch.log_softmax(model(tokens).detach()[0].double(), -1)
        nats -= float(log_p[:-1].gather(1, tokens[0, 1:, None]).sum())
        size_bytes += len(text.encode())
    assert result["bytes"] == size_bytes
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size_bytes, rel=1e-5)


def test_a_model_that_knows_nothing_pays_the_logarithm_of_its_vocabulary(loaded: tuple[Any, Any], corpus: Path) -> None:
    _, tokenizer = loaded
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluate("completion", model, tokenizer=tokenizer, corpus=corpus, cases=1, max_tokens=1)
    assert result["bits_per_byte"] == pytest.approx(
        result["tokens"] * math.log2(tokenizer.vocab_size) / result["bytes"]
    )


# ---- documents and lines


def documents(n: int) -> list[Document]:
    return [Document(f"{i}.py", "code", CODE.replace("place", f"place{i}")) for i in range(n)]


def test_every_line_that_may_be_asked_for_comes_once_with_all_that_stands_before_it() -> None:
    long = "x" * (LONGEST_LINE + 1)
    text = f"first\n\n  second  \n{long}\nthird\n\t\nlast without an end"
    cases = list(choose_cases([Document("a.py", "code", text)], seed=0))
    assert sorted((case.line, case.target) for case in cases) == [
        (3, "second"),
        (5, "third"),
        (7, "last without an end"),
    ]
    for case in cases:
        assert text.startswith(case.prompt)
        assert text[len(case.prompt) :].split("\n")[0].strip() == case.target


def test_a_block_is_what_is_indented_deeper_than_the_line_before_it_in_whatever_language() -> None:
    text = "if (x) {\n\ta();\n\n\tif (y) {\n\t\tb();\n\t}\n}\nelse\n  c();\n"
    text += "for\n" + "  d();\n" * (LONGEST_BLOCK + 1) + "for\n  e();\n" + "\n" * LONGEST_BLOCK + "  e();\n"
    cases = {case.line: case for case in choose_blocks([Document("a.c", "code", text)], seed=0)}
    assert {line: case.target for line, case in cases.items()} == {
        2: "\ta();\n\n\tif (y) {\n\t\tb();\n\t}",
        5: "\t\tb();",
        9: "  c();",
    }
    for case in cases.values():
        assert text.startswith(case.prompt)
        assert text[len(case.prompt) :].startswith(case.target)


def test_a_long_file_takes_no_more_memory_than_the_cases_that_are_taken() -> None:
    text = "class A:\n" + "    def f(self):\n        return self.something\n" * 10_000
    tracemalloc.start()
    for choose in (choose_cases, choose_blocks):
        list(itertools.islice(choose([Document("a.py", "code", text)], seed=0), 4))
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_bytes < 20 * len(text)


def test_the_first_lines_come_from_different_documents() -> None:
    cases = list(itertools.islice(choose_cases(documents(7), seed=0), 14))
    assert Counter(case.document for case in cases) == {f"code/{i}.py": 2 for i in range(7)}


def test_the_kth_line_of_a_document_follows_from_seed_document_and_k_alone() -> None:
    def of(name: str, some: list[Document], seed: int) -> list[int]:
        return [case.line for case in choose_cases(some, seed) if case.document == f"code/{name}"]

    alone, among = of("3.py", documents(4)[3:], 0), of("3.py", documents(9), 0)
    assert alone == among
    assert len({tuple(of("3.py", documents(4), seed)) for seed in range(20)}) > 3
    assert len({tuple(of(f"{i}.py", documents(20), 0)) for i in range(20)}) > 3


def test_documents_are_chosen_by_hash_wherever_they_stand() -> None:
    some = choose_documents(documents(30), 5, seed=0)
    assert some == choose_documents(documents(30)[::-1], 5, seed=0)
    assert some != documents(30)[:5]
    assert some != choose_documents(documents(30), 5, seed=1)


def test_one_file_is_read_as_a_folder_that_holds_it(tmp_path: Path) -> None:
    file = tmp_path / "code" / "file.py"
    file.parent.mkdir()
    file.write_bytes(b"\xef\xbb\xbf" + CODE.replace("\n", "\r\n").encode())
    (alone,), (in_folder,) = read_documents(file), read_documents(file.parent)
    assert alone.text == in_folder.text == CODE.replace("\n", "\r\n")


def test_code_folders_give_each_text_once(corpus: Path) -> None:
    assert len(read_documents(corpus)) == 5
    assert {document.text for document in read_documents(corpus)} == {
        CODE.replace("place", f"place{i}") for i in range(5)
    }


def test_of_a_prepared_folder_the_held_out_part_is_scored_text_for_text(
    loaded: tuple[Any, Any], corpus: Path, tmp_path: Path
) -> None:
    _, tokenizer = loaded
    for i in range(5, 40):
        (corpus / f"file{i}.py").write_text(CODE.replace("place", f"pläce{i}"))
    tokenizer.save(tmp_path / "tokenizer")
    puna.prepare(
        "code", [corpus], tmp_path / "prepared", tokenizer=tmp_path / "tokenizer", held_out=0.3, fim_rate=0.9, workers=1
    )
    held_out = read_documents(tmp_path / "prepared")
    assert 0 < len(held_out) < 40
    assert {document.text for document in held_out} < {document.text for document in read_documents(corpus)}
    assert held_out == read_documents(tmp_path / "prepared/held_out")

    (tmp_path / "dialogs.json").write_text('[{"instruction": "Add", "input": "", "output": "x + y"}]')
    puna.prepare(
        "chat",
        [tmp_path / "dialogs.json"],
        tmp_path / "dialogs",
        tokenizer=tmp_path / "tokenizer",
        template="alpaca",
        workers=1,
    )
    with pytest.raises(PunaError, match="dialogs holds dialogs"):
        read_documents(tmp_path / "dialogs")

    puna.prepare("code", [corpus], tmp_path / "cut", tokenizer=tmp_path / "tokenizer", fim_rate=1.0, workers=1)
    with pytest.raises(PunaError, match=r"cut for infilling and has no held-out part; .*--held-out"):
        read_documents(tmp_path / "cut")


def test_what_cannot_be_scored_is_refused(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    (tmp_path / "empty").mkdir()
    with pytest.raises(PunaError, match=r"empty holds no code to score on: it is empty"):
        read_documents(tmp_path / "empty")
    (tmp_path / "empty/x.unknown").write_text("text")
    with pytest.raises(PunaError, match=r"no code to score on: 1 × no known language"):
        read_documents(tmp_path / "empty")
    with pytest.raises(PunaError, match="nowhere does not exist"):
        read_documents(tmp_path / "nowhere")
    (tmp_path / "empty/x.py").write_text("print()\n")
    with pytest.raises(PunaError, match="no line to ask for"):
        evaluate("completion", model, tokenizer=tokenizer, corpus=tmp_path / "empty")
    with pytest.raises(UsageError, match="--corpus DIR"):
        evaluate("completion", model, tokenizer=tokenizer)
    with pytest.raises(UsageError, match="completion scores a model"):
        evaluate("completion", corpus=tmp_path)


# ---- the whole


def test_lines_are_the_models_own_and_compared_stripped(
    loaded: tuple[Any, Any], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    said = {"import": "  return os.getcwd() ", "other": "  return os.getcwd\nmore"}

    class Fake:
        cut_prompts = 0

        def __init__(self, *_: object, **__: object) -> None: ...

        def __call__(self, asks: list[Ask], stop: tuple[str, ...] = (), **_: object) -> list[str]:
            prompts = [ask.prefix for ask in asks]
            if stop != ("\n",):  # blocks
                return ["    return os.getcwd()  \n\n\nprint()\n" if "place1" in p else "\tpass\n" for p in prompts]
            return [
                said["import" if prompt.endswith("():\n") and "place1" in prompt else "other"] for prompt in prompts
            ]

    monkeypatch.setattr(completion, "Completer", Fake)
    result = evaluate("completion", model, tokenizer=tokenizer, corpus=corpus, cases=1000, batch=3, output=tmp_path)
    every = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    records = [record for record in every if record["kind"] == "line"]
    assert len(records) == result["cases"] == 5 * 3
    assert [record["target"] for record in records if record["exact_match"]] == ["return os.getcwd()"]
    near = [record for record in records if record["target"] == "return os.getcwd()" and not record["exact_match"]]
    assert [record["edit_similarity"] for record in near] == [pytest.approx(1 - 2 / 18)] * 4
    assert result["exact_match"] == 1 / 15
    assert result["edit_similarity"] == pytest.approx(sum(record["edit_similarity"] for record in records) / 15)
    blocks = [record for record in every if record["kind"] == "block"]
    assert {record["target"] for record in blocks} == {"    return os.getcwd()"}
    assert [record["completion"] for record in blocks if record["exact_match"]] == ["    return os.getcwd()"]
    assert (result["blocks"], result["block_exact_match"]) == (5, 1 / 5)
    assert result["intervals"]["block_exact_match"][0] < 1 / 5 < result["intervals"]["block_exact_match"][1]


def test_lines_and_blocks_have_one_cache_between_them_and_nothing_is_kept(
    tiny_model_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = []

    class InACircle(puna.generate.Engine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.itself = self
            engines.append(weakref.ref(self))

    monkeypatch.setattr(puna.generate, "Engine", InACircle)
    gc.disable()
    try:
        evaluate("completion", str(tiny_model_folder), corpus=corpus, cases=4, max_tokens=2, device="cpu")
    finally:
        gc.enable()
    assert [engine() for engine in engines] == [None]


def test_scores_do_not_depend_on_the_batch_and_repeat(loaded: tuple[Any, Any], corpus: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded
    results, lines = [], []
    for batch in (1, 4, 4):
        output = tmp_path / f"{len(results)}"
        result = evaluate(
            "completion", model, tokenizer=tokenizer, corpus=corpus, cases=6, max_tokens=4, batch=batch, output=output
        )
        assert json.loads(json.dumps(result)) == result
        result.pop("seconds")
        results.append(result)
        lines.append((output / "cases.jsonl").read_text())
    assert results[0] == results[1] == results[2]
    assert lines[0] == lines[1] == lines[2]


def test_prompts_beyond_the_context_lose_their_beginning_and_are_counted(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    _, tokenizer = loaded
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    (tmp_path / "long.py").write_text("".join(f"variable_{i} = {i}\n" for i in range(100)))
    result = evaluate("completion", model, tokenizer=tokenizer, corpus=tmp_path, cases=99, max_tokens=4)
    assert result["cases"] == 99
    assert 80 < result["cut_prompts"] < 99
    assert result["window"] == 64
