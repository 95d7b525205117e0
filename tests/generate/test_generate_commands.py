"""`puna generate`, `puna infill` and `puna chat`, as someone at a terminal meets them, and their Python twins."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.checkpoint import quantize, save_model
from puna.cli import _shared as shared
from puna.cli import run
from puna.cli._shared import SAMPLING
from puna.cli.generate import Results, results_in
from puna.errors import PunaError, UsageError
from puna.evaluate.completing import Ask, Completer
from puna.files import mark_of
from puna.generate import Completion, Sampling, complete
from puna.generate.engine import storage
from puna.generate.engine.runner import Logits, Runner
from puna.generate.engine.scheduler import Chunk
from puna.generate.engine.storage import round_heads
from puna.prompts import chat_template, cut_around_gap, infill_prompt
from puna.testing import ScriptedModel, tiny_model, write_tiny_model
from puna.tokenizer import Tokenizer, train_tokenizer

QUESTION = "def f(x):\n"


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path):
    return puna.load(tiny_model_folder)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch):
    """Puts text, or bytes, on standard input."""

    def put(content: str | bytes) -> None:
        content = content.encode() if isinstance(content, str) else content
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return put


def continued(loaded, prompt: str, **settings) -> str:
    """What the model says behind a prompt, by way of tokens."""
    model, tokenizer = loaded
    return complete(model, tokenizer, [tokenizer.encode(prompt, bos=True)], Sampling(**settings))[0].text


# Python


def test_generate_is_the_twin_of_complete_for_texts(loaded) -> None:
    model, tokenizer = loaded
    completions = puna.generate(model, tokenizer, [QUESTION, "import"], max_tokens=12, stop="zz")
    assert [completion.text for completion in completions] == [
        continued(loaded, QUESTION, max_tokens=12),
        continued(loaded, "import", max_tokens=12),
    ]
    assert completions[0].prompt_tokens == len(tokenizer.encode(QUESTION)) + 1
    assert puna.generate(model, tokenizer, QUESTION, max_tokens=12) == completions[:1]


def test_generate_tells_of_each_completion_when_it_is_there(loaded) -> None:
    seen: dict[int, object] = {}
    completions = puna.generate(
        *loaded, [QUESTION, "import", "a"], max_tokens=5, batch_rows=2, on_completion=seen.__setitem__
    )
    assert seen == dict(enumerate(completions))


def test_generate_refuses_an_empty_prompt_and_an_unknown_setting(loaded) -> None:
    with pytest.raises(PunaError, match="prompt 1 is empty"):
        puna.generate(*loaded, ["x", ""])
    with pytest.raises(UsageError, match="no sampling setting is called topp"):
        puna.generate(*loaded, "x", topp=0.5)
    for name in ("n", "batch_rows"):
        with pytest.raises(UsageError, match=f"{name}=0 must be 1 or more"):
            puna.generate(*loaded, "x", **{name: 0})


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_infill_asks_in_the_published_layout_and_ends_at_eot(loaded, order: str) -> None:
    tokenizer: Tokenizer = loaded[1]
    prompt = infill_prompt(tokenizer, "def f(x):\n    ", "\n    return y", order=order)  # type: ignore[arg-type]
    middle = tokenizer.encode(" y = x", leading_space=False)
    scripted = ScriptedModel([*middle, tokenizer.infilling.eot_id, 70], prompt_tokens=len(prompt))
    for settings in ({}, {"ignore_eos": True}):
        completion = puna.infill(
            scripted, tokenizer, "def f(x):\n    ", "\n    return y", order=order, healing=False, **settings
        )
        assert (completion.text, completion.finish, completion.prompt_tokens) == (" y = x", "stop", len(prompt))


def test_infill_needs_markers_and_a_known_order(loaded, tmp_path: Path) -> None:
    plain = train_tokenizer(["def f(x):\n    return x\n" * 50], tmp_path, vocab_size=280, infilling=False)
    with pytest.raises(PunaError, match=r"no infilling markers.*7B, 13B and 70B"):
        puna.infill(loaded[0], plain, "a", "b")
    with pytest.raises(UsageError, match='"psm" or "spm", not \'mps\''):
        puna.infill(*loaded, "a", "b", order="mps")


def test_infill_fits_a_long_file_to_the_context_or_a_budget(loaded) -> None:
    model, tokenizer = loaded
    context = model.config.max_position_embeddings
    long = "a = 1\n" * context
    completion = puna.infill(model, tokenizer, long, long, max_tokens=20, ignore_eos=True)
    assert context - 20 - 10 < completion.prompt_tokens <= context - 20
    assert puna.infill(model, tokenizer, long, long, max_tokens=1, budget=30).prompt_tokens <= 30
    assert puna.infill(model, tokenizer, long, "", max_tokens=2 * context).prompt_tokens <= context // 2


def test_infill_tells_what_it_keeps_of_a_longer_file_and_cuts_it_once(
    loaded, tiny_model_folder: Path, monkeypatch
) -> None:
    cuts: list[int] = []

    def counted(tokenizer: Tokenizer, prefix: str, suffix: str, budget: int) -> tuple[str, str]:
        cuts.append(budget)
        return cut_around_gap(tokenizer, prefix, suffix, budget)

    monkeypatch.setattr("puna.generate.gap.cut_around_gap", counted)
    monkeypatch.setattr("puna.prompts.cut_around_gap", counted)
    kept: list[tuple[str, ...]] = []
    prefix, suffix = "a = 1\n" * 50, "b = 2\n" * 50
    puna.infill(*loaded, prefix, suffix, budget=100, max_tokens=1, on_cut=lambda *texts: kept.append(texts))
    assert kept == [cut_around_gap(loaded[1], prefix, suffix, 100)]
    puna.infill(*loaded, "a", "b", budget=100, max_tokens=1, on_cut=lambda *texts: kept.append(texts))
    assert len(kept) == 1
    words = ["infill", str(tiny_model_folder), "--prefix", prefix, "--suffix", suffix, "--max-tokens", "1"]
    assert run([*words, "--budget", "60"]) == 0
    completer = Completer(*loaded, max_tokens=1, stop=(), batch_rows=1)
    completer([Ask(prefix * 9, suffix=suffix * 9)])
    assert completer.cut_prompts == 1
    assert cuts == [100, 100, 60, completer.longest_prompt]


def test_chat_ends_where_the_template_says(loaded) -> None:
    from puna.generate import chat

    model, tokenizer = loaded
    messages = [{"role": "user", "content": "hello"}]
    prompt = chat_template("codellama").encode(tokenizer, messages).tokens
    answer = tokenizer.encode(" Hi there. ", leading_space=False)
    scripted = ScriptedModel([*answer, tokenizer.eos_id], prompt_tokens=len(prompt))
    assert chat(scripted, tokenizer, messages, template="codellama").text == " Hi there. "
    with pytest.raises(PunaError, match="ends with a message of the user"):
        chat(model, tokenizer, [*messages, {"role": "assistant", "content": "x"}], template="codellama")


# puna generate


def test_one_prompt_prints_its_completion_alone(loaded, tiny_model_folder: Path, capsys) -> None:
    assert run(["generate", str(tiny_model_folder), QUESTION, "--max-tokens", "12"]) == 0
    captured = capsys.readouterr()
    assert captured.out == continued(loaded, QUESTION, max_tokens=12) + "\n"
    assert captured.err == ""


def test_one_prompt_is_printed_while_it_grows(tiny_model_folder: Path, monkeypatch) -> None:
    written: list[str] = []
    monkeypatch.setattr("puna.cli._shared.print_piece", lambda _, piece: written.append(piece))
    assert run(["generate", str(tiny_model_folder), QUESTION, "--max-tokens", "12", "--ignore-eos"]) == 0
    assert len(written) > 3


def test_a_prompt_from_standard_input_is_taken_to_the_letter(loaded, tiny_model_folder: Path, capsys, typed) -> None:
    typed(QUESTION)
    assert run(["generate", str(tiny_model_folder), "-", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == continued(loaded, QUESTION, max_tokens=8) + "\n"


def test_every_sampling_option_arrives(loaded, tiny_model_folder: Path, capsys) -> None:
    options = {
        "temperature": 0.9,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "max_tokens": 20,
        "seed": 7,
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert run(["generate", str(tiny_model_folder), QUESTION, *words]) == 0
    text = capsys.readouterr().out[:-1]
    assert text == continued(loaded, QUESTION, **options)
    for name, default in (("seed", 0), ("temperature", 3.0), ("repetition_penalty", 1.0), ("top_k", 1)):
        pairs = ([{**options, "seed": seed}, {"seed": seed, name: default}] for seed in range(7, 17))
        texts = ([continued(loaded, QUESTION, **{**each, **change}) for change in ({}, other)] for each, other in pairs)
        assert any(one != another for one, another in texts), f"{name} changes nothing here"


def test_stop_options_arrive(loaded, tiny_model_folder: Path, capsys) -> None:
    model, tokenizer = loaded
    (whole,) = puna.generate(model, tokenizer, QUESTION, max_tokens=30)
    stop = whole.text[len(whole.text) // 2 :][:2]
    assert (
        run(["generate", str(tiny_model_folder), QUESTION, "--max-tokens", "30", "--stop", "~~", "--stop", stop]) == 0
    )
    assert capsys.readouterr().out == whole.text[: whole.text.index(stop)] + "\n"
    at = whole.tokens[len(whole.tokens) // 2]
    assert run(["generate", str(tiny_model_folder), QUESTION, "--stop-id", str(at), "--json"]) == 0
    (completion,) = json.loads(capsys.readouterr().out)["completions"]
    assert (completion["completion_tokens"], completion["finish"]) == (whole.tokens.index(at), "stop")


def test_several_prompts_are_printed_under_headings(loaded, tiny_model_folder: Path, capsys) -> None:
    assert run(["generate", str(tiny_model_folder), QUESTION, "import", "--max-tokens", "6", "--ignore-eos"]) == 0
    first, second = (continued(loaded, prompt, max_tokens=6, ignore_eos=True) for prompt in (QUESTION, "import"))
    assert capsys.readouterr().out == (
        f"=== 1/2: 'def f(x):' (length)\n{first}\n=== 2/2: 'import' (length)\n{second}\n"
    )


def test_json_is_one_object_and_nothing_else(loaded, tiny_model_folder: Path, capsys) -> None:
    words = ["generate", str(tiny_model_folder), QUESTION, "import", "--max-tokens", "6", "--ignore-eos"]
    assert run([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == str(tiny_model_folder)
    assert result["completion_tokens"] == 12
    assert result["completions"][1] == {
        "prompt": "import",
        "completion": continued(loaded, "import", max_tokens=6, ignore_eos=True),
        "finish": "length",
        "prompt_tokens": len(loaded[1].encode("import")) + 1,
        "completion_tokens": 6,
    }


def test_json_lines_go_in_and_come_out_with_their_other_fields(
    loaded, tiny_model_folder: Path, tmp_path: Path, capsys
) -> None:
    asked = [{"task_id": "t/0", "prompt": QUESTION}, {"task_id": "t/1", "prompt": "naïve = '高原'"}]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(record) for record in asked) + "\n")
    words = ["generate", str(tiny_model_folder), "--file", str(source), "-o", str(output), "--max-tokens", "6"]
    assert run(words) == 0
    assert capsys.readouterr().out == f"{output}\n"
    answered = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(record["task_id"], record["prompt"]) for record in answered] == [
        (r["task_id"], r["prompt"]) for r in asked
    ]
    assert [record["completion"] for record in answered] == [
        continued(loaded, r["prompt"], max_tokens=6) for r in asked
    ]


def test_completions_that_are_there_are_not_replaced(tiny_model_folder: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out.jsonl"
    output.touch()  # as mktemp does
    words = ["generate", str(tiny_model_folder), QUESTION, "-o", str(output), "--max-tokens", "2"]
    assert run(words) == 0
    before = output.read_bytes()
    assert before
    assert run([*words, "--seed", "5", "--temperature", "1"]) == 1
    assert f"{output} exists already; choose another place or remove it first" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_a_killed_run_continues_with_the_completions_it_has(
    loaded, tiny_model_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"x = {i}"}) + "\n" for i in range(5)))
    words = ["generate", str(tiny_model_folder), "--file", str(source), "-o", str(output), "--max-tokens", "4"]
    words += ["--n", "2", "--temperature", "0.9", "--batch-rows", "3"]
    put, count = Results.put, 0

    def killed_later(self: Results, number: int, result: dict) -> None:
        nonlocal count
        put(self, number, result)
        count += 1
        if count == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Results, "put", killed_later)
    assert run(words) != 0
    assert not output.exists()
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(partial.read_text() + '[7, {"prom')  # cut off in the middle of a line
    monkeypatch.setattr(Results, "put", put)
    assert run(words) == 0
    assert "4 of 10 are there" in capsys.readouterr().err
    expected = [
        continued(loaded, f"x = {i}", max_tokens=4, temperature=0.9, seed=seed) for i in range(5) for seed in range(2)
    ]
    assert [json.loads(line)["completion"] for line in output.read_text().splitlines()] == expected
    assert not partial.exists()


def test_completions_of_any_characters_are_found_again(tmp_path: Path) -> None:
    ones = [{"completion": text, "note": "\ud800"} for text in ("a\u2028b", "c\x85d\x0ce", "f\r\n")]
    with contextlib.suppress(KeyboardInterrupt), results_in(tmp_path / "out", "asked") as killed:
        for number, one in enumerate(ones):
            killed.put(number, one)
        raise KeyboardInterrupt
    partial = tmp_path / "out.partial"
    partial.write_bytes(partial.read_bytes() + '[3, {"completion": "é'.encode()[:-1])  # cut off within a character
    with results_in(tmp_path / "out", "asked") as results:
        assert [results.has(range(number, number + 1)) for number in range(4)] == [True, True, True, False]
        results.put(3, {"completion": "g"})
    lines = (tmp_path / "out").read_text().split("\n")
    assert [json.loads(line) for line in lines if line] == [*ones, {"completion": "g"}]


def test_a_prompt_beyond_the_context_is_named_by_its_line_and_can_be_left_out(
    tiny_model_folder: Path, tmp_path: Path, capsys
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [{"prompt": "x"}, {"prompt": "x 1 " * 2048}, {"prompt": "y"}]
    source.write_text("\n\n".join(map(json.dumps, records)))
    words = ["generate", str(tiny_model_folder), "--file", str(source), "-o", str(output), "--max-tokens", "2"]
    assert run([*words, "--n", "2", "--temperature", "0.5"]) == 1
    assert re.search(r"in.jsonl:3 has \d+ tokens and the model's context 2048; shorten it", capsys.readouterr().err)
    assert run([*words, "--keep-going"]) == 0
    assert "left out: " in capsys.readouterr().err
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["x", "y"]
    source.write_text(json.dumps(records[1]))
    output.unlink()
    assert run([*words, "--keep-going"]) == 1
    assert "no prompt leaves room" in capsys.readouterr().err


def test_a_prompt_that_may_outgrow_the_cache_is_named_by_its_line_and_can_be_left_out(
    loaded, tiny_model_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("puna.generate.engine.engine.free_memory_bytes", lambda device: 0)  # one block
    source, output, long = tmp_path / "in.jsonl", tmp_path / "out", "x = 1\n" * 9
    source.write_text("".join(json.dumps({"prompt": text}) + "\n\n" for text in ("x", long, "y", long)))
    words = ["generate", str(tiny_model_folder), "--file", str(source), "-o", str(output), "--n", "2"]
    words += ["--temperature", "1"]
    assert run([*words, "--max-tokens", "8"]) == 1
    said = r"in.jsonl:3 may grow to \d+ tokens, and the cache holds 32; lower .*, or leave it out with --keep-going"
    assert re.search(said, capsys.readouterr().err)
    assert run([*words, "--max-tokens", "8", "--keep-going"]) == 0
    assert re.findall(r"left out: .*:(\d) may grow", capsys.readouterr().err) == ["3", "7"]
    answered = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["prompt"] for record in answered] == ["x", "x", "y", "y"]
    assert [record["completion"] for record in answered[::2]] == [
        continued(loaded, one, max_tokens=8, temperature=1.0) for one in "xy"
    ]


def test_where_no_prompt_but_one_fits_the_cache_only_that_is_printed(
    loaded, tiny_model_folder: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("puna.generate.engine.engine.free_memory_bytes", lambda device: 0)
    words, long = ["generate", str(tiny_model_folder), "--max-tokens", "8", "--keep-going"], "x = 1\n" * 9
    assert run([*words, long, "y"]) == 0
    assert capsys.readouterr().out == f"=== 1/1: 'y' (length)\n{continued(loaded, 'y', max_tokens=8)}\n"
    assert run([*words, long]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search("left out: prompt 1 may grow .*\npuna: no prompt leaves room .* in the cache", captured.err)


def test_a_prompt_that_outgrew_the_cache_is_completed_once_there_is_room(
    loaded, tiny_model_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    source, output, long = tmp_path / "in.jsonl", tmp_path / "out", "x = 1\n" * 9
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("x", long, "y")))
    words = ["generate", str(tiny_model_folder), "--file", str(source), "-o", str(output), "--max-tokens", "8"]

    def killed(self: Results, number: int, result: dict) -> None:
        put(self, number, result)
        raise KeyboardInterrupt

    put = Results.put
    with monkeypatch.context() as small:
        small.setattr("puna.generate.engine.engine.free_memory_bytes", lambda device: 0)
        small.setattr(Results, "put", killed)
        assert run([*words, "--keep-going", "--batch-rows", "1"]) == 130
    assert not output.exists()
    assert run(words) == 0
    assert "1 of 3 are there" in capsys.readouterr().err
    answered = [json.loads(line)["completion"] for line in output.read_text().splitlines()]
    assert answered == [continued(loaded, text, max_tokens=8) for text in ("x", long, "y")]


def test_a_longer_context_than_the_files_is_an_option(tiny_model_folder: Path, tmp_path: Path, capsys, typed) -> None:
    model, tokenizer = puna.load(tiny_model_folder, context=4000)
    text = "x 1 " * 700
    assert 2048 < (length := len(tokenizer.encode(text, bos=True))) < 3990
    words = [str(tiny_model_folder), "--max-tokens", "6"]
    assert run(["generate", *words, text]) == 1
    assert f"prompt 1 has {length} tokens and the model's context 2048; shorten it, or raise --context" in (
        capsys.readouterr().err
    )
    longer = [*words, "--context", "4000"]
    assert run(["generate", *longer, text, "--draft", str(tiny_model_folder)]) == 0
    assert capsys.readouterr().out == continued((model, tokenizer), text, max_tokens=6) + "\n"
    assert run(["infill", *longer, "--prefix", text]) == 0
    captured = capsys.readouterr()
    assert "the model sees the last" not in captured.err
    assert captured.out == puna.infill(model, tokenizer, text, "", max_tokens=6).text + "\n"
    typed(text.encode())
    assert run(["chat", *longer, "--template", "codellama"]) == 0


@pytest.mark.parametrize("changed", ["prompts", "options", "context", "weights"])
def test_completions_of_another_run_are_neither_taken_up_nor_lost(
    tiny_model_folder: Path, tmp_path: Path, capsys, monkeypatch, changed: str
) -> None:
    shutil.copytree(tiny_model_folder, model := tmp_path / "model")
    (source := tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    words = ["generate", str(model), "--file", str(source), "-o", str(tmp_path / "out"), "--max-tokens", "2"]

    def killed(self: Results, number: int, result: dict) -> None:
        put(self, number, result)
        raise KeyboardInterrupt

    put = Results.put
    monkeypatch.setattr(Results, "put", killed)
    assert run(words) != 0
    before = (partial := tmp_path / "out.partial").read_text()
    monkeypatch.setattr(Results, "put", put)
    if changed == "prompts":
        source.write_text('{"prompt": "x"}\n{"prompt": "z"}\n')
    elif changed == "weights":
        os.utime(model / "model.safetensors", ns=(0, 0))
    more = {"options": ["--temperature", "0.5"], "context": ["--context", "3000"]}
    assert run([*words, *more.get(changed, [])]) == 1
    assert "was begun by another run" in capsys.readouterr().err
    assert partial.read_text() == before


def test_a_run_of_an_earlier_version_is_gone_on_with(tiny_model_folder: Path, tmp_path: Path, capsys) -> None:
    (source := tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    weights = mark_of(tiny_model_folder.glob("*.safetensors"))
    settings = {name: getattr(Sampling(max_tokens=2), name) for name in SAMPLING}
    records = [{"prompt": "x"}, {"prompt": "y"}]
    asked = json.dumps([str(tiny_model_folder), weights, None, None, 1, False, settings, records])  # no --context yet
    there = json.dumps([1, {"prompt": "y", "completion": "of before", "completion_tokens": 2}])
    (tmp_path / "out.partial").write_text(hashlib.sha256(asked.encode()).hexdigest() + f"\n{there}\n")
    words = ["generate", str(tiny_model_folder), "--file", str(source), "-o", str(tmp_path / "out")]
    assert run([*words, "--max-tokens", "2"]) == 0
    assert json.loads((tmp_path / "out").read_text().splitlines()[1])["completion"] == "of before"


def test_a_bad_line_among_prompts_can_be_left_out(tiny_model_folder: Path, tmp_path: Path, capsys) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'{"prompt": "x"}\n{"prompt"\n{"prompt": "\\ud83d"}\n{"prompt": "caf\xe9"}\n{"prompt": "y"}\n')
    words = ["generate", str(tiny_model_folder), "--file", str(source), "-o", str(output), "--max-tokens", "2"]
    assert run(words) == 1
    assert "in.jsonl:2 is not JSON" in (said := capsys.readouterr().err)
    assert "--keep-going" in said
    assert run([*words, "--keep-going"]) == 0
    said = capsys.readouterr().err
    assert "in.jsonl:3 is not UTF-8 text (character 0 is half of a surrogate pair)" in said
    assert "in.jsonl:4 is not UTF-8 text (byte 15)" in said
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["x", "y"]


def test_wrong_prompts_are_told_apart_before_the_model_is_loaded(tmp_path: Path, capsys, typed) -> None:
    def message(*words: str, code: int) -> str:
        assert run(["generate", "no/such/model", *words]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        return captured.err

    file = tmp_path / "prompts.jsonl"
    assert "give prompts as arguments" in message(code=2)
    assert f"{file} does not exist" in message("--file", str(file), code=1)
    file.write_text("\n")
    assert "holds no prompts" in message("--file", str(file), code=1)
    file.write_text('{"prompt": "x"}\n{"text": "x"}\n')
    assert f'{file}:2 is not an object with a text "prompt"' in message("--file", str(file), code=1)
    file.write_text('{"prompt": "x"}\n{"prompt"\n')
    assert f"{file}:2 is not JSON" in message("--file", str(file), code=1)
    file.write_text('{"prompt": "x"}\n{"prompt": "x", "number": 1' + "1" * 5000 + "}\n")
    assert f"{file}:2 is not JSON (Exceeds the limit" in message("--file", str(file), code=1)
    file.write_text('{"prompt": "x", "finish": "y", "completion": "reference"}\n')
    assert f"{file}:1 has completion, finish already, which the result would" in message("--file", str(file), code=1)
    assert "give prompts as arguments" in message("x", "--file", str(file), code=2)
    assert "prompt 2 is empty, so there is nothing to continue" in message("x", "", code=1)
    assert "prompt 1 is not UTF-8 text (character 3 is half" in message("caf\udce9", code=1)
    typed(b"caf\xe9")
    assert "- is not UTF-8 text (byte 3)" in message("-", code=1)
    assert "top_p=1.5 must be above 0 and at most 1" in message("x", "--top-p", "1.5", code=2)


def test_a_model_that_cannot_be_used_is_an_error_of_one_line(tiny_model_folder: Path, tmp_path: Path, capsys) -> None:
    def message(*words: str, code: int) -> str:
        assert run(["generate", *words]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    assert "there is no folder" in message(str(tmp_path / "none"), "x", code=1)
    assert "device 'fpga' is not there" in message(str(tiny_model_folder), "x", "--device", "fpga", code=2)
    assert "no dtype is called 'fp8'" in message(str(tiny_model_folder), "x", "--dtype", "fp8", code=2)
    assert "context 2048; shorten it" in message(str(tiny_model_folder), "x 1 " * 2048, code=1)
    save_model(tiny_model(), tmp_path / "bare")
    assert "has no tokenizer" in message(str(tmp_path / "bare"), "x", code=1)


def test_sixteen_bits_on_a_cpu_without_units_for_them_are_pointed_out_where_fp32_would_be_faster(
    tiny_model_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("puna.devices.has_fast_bf16", lambda device: False)
    words = ["generate", str(tiny_model_folder), "x", "--max-tokens", "2", "--device", "cpu"]
    assert run([*words, "--dtype", "bf16"]) == 0
    assert "--dtype fp32 is many times faster" in capsys.readouterr().err
    assert run(words) == 0
    assert capsys.readouterr().err == ""
    quantize(tiny_model_folder, tmp_path / "int8")
    capsys.readouterr()
    assert (
        run(["generate", str(tmp_path / "int8"), "x", "--max-tokens", "2", "--device", "cpu", "--dtype", "bf16"]) == 0
    )
    assert capsys.readouterr().err == ""


def test_a_draft_and_healing_are_options(loaded, tiny_model_folder: Path, tmp_path: Path, capsys) -> None:
    draft = write_tiny_model(tmp_path / "draft", seed=7)
    words = ["generate", str(tiny_model_folder), "retur", "--max-tokens", "12"]
    assert run([*words, "--draft", str(draft)]) == 0
    assert capsys.readouterr().out == continued(loaded, "retur", max_tokens=12) + "\n"
    assert run([*words, "--healing"]) == 0
    healed = puna.generate(*loaded, "retur", healing=True, max_tokens=12)[0].text
    assert capsys.readouterr().out == healed + "\n"
    assert healed != continued(loaded, "retur", max_tokens=12)


def test_what_does_not_go_is_refused_before_a_model_is_looked_for(capsys) -> None:
    for wrong, reason in (
        (["--lookup", "--draft", "small"], "give lookup or a draft model, not both"),
        (["--cache-dtype", "int4"], "a cache is kept in int8 or fp8"),
        (["--n", "2"], "n=2 completions of a prompt are all the same at temperature 0"),
    ):
        assert run(["generate", "nowhere/model", "x", *wrong]) == 2
        assert reason in capsys.readouterr().err
    assert run(["infill", "nowhere/model", "--prefix", "x", "--order", "mps"]) == 2
    assert '"psm" or "spm", not \'mps\'' in capsys.readouterr().err


def test_an_output_that_cannot_be_is_refused_before_a_model_is_looked_for(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    for output, reason in ((tmp_path, "is a folder; name a file"), (tmp_path / "file/x", "is a file; name a folder")):
        assert run(["generate", "nowhere/model", "x", "-o", str(output)]) == 1
        assert reason in capsys.readouterr().err


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with results_in(tmp_path / "out", "asked") as results:
        with pytest.raises(PunaError, match=r"another process is writing .*out; wait for it"):
            results_in(tmp_path / "out", "asked").__enter__()
        results.put(0, {"prompt": "x"})
    assert (tmp_path / "out").read_text() == '{"prompt": "x"}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_locks_two_runs_of_one_file_end_with_the_results_of_the_last(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("puna.files.try_lock", lambda file: None)
    with results_in(tmp_path / "out", "asked") as last, results_in(tmp_path / "out", "asked otherwise") as first:
        last.put(0, {"prompt": "x"})
        first.put(0, {"prompt": "y"})
    assert (tmp_path / "out").read_text() == '{"prompt": "x"}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_run_wrote_while_the_model_was_loaded_is_not_lost(
    tiny_model_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    words = ["generate", str(tiny_model_folder), "--max-tokens", "2", "-o", str(tmp_path / "out")]
    load = shared.open_model

    def load_slowly(*args: Any) -> Any:
        monkeypatch.setattr(shared, "open_model", load)
        assert run([*words, "other"]) == 0
        return load(*args)

    monkeypatch.setattr(shared, "open_model", load_slowly)
    assert run([*words, "x"]) == 1
    assert "out exists already; choose another place or remove it first" in capsys.readouterr().err
    assert json.loads((tmp_path / "out").read_text())["prompt"] == "other"


def test_a_device_takes_results_and_stays(tiny_model_folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reading = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    assert run(["generate", str(tiny_model_folder), "x", "--max-tokens", "2", "-o", str(tmp_path / "pipe")]) == 0
    assert json.loads(reading.communicate(timeout=10)[0])["prompt"] == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_processes_that_cannot_share_the_model_are_not_started(tiny_model_folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("puna.parallel.start.start_processes", lambda *_: pytest.fail("they were started"))
    assert run(["generate", str(tiny_model_folder), "x", "--nproc", "99"]) == 2
    assert "--nproc=99 must divide the 2 key/value heads; use one of [1, 2]" in capsys.readouterr().err


def test_a_file_of_windows_is_read_as_any_other(tmp_path: Path, tiny_model_folder: Path, capsys) -> None:
    said = []
    for start, end in ((b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")):
        (tmp_path / "in.jsonl").write_bytes(start + end.join([b'{"prompt": "x"}', b'{"prompt": "y"}', b""]))
        assert run(["generate", str(tiny_model_folder), "--file", str(tmp_path / "in.jsonl"), "--max-tokens", "2"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


def test_an_empty_prompt_in_a_file_is_named_by_its_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n{"prompt": ""}\n')
    assert run(["generate", "nowhere/model", "--file", str(tmp_path / "prompts.jsonl")]) == 1
    assert (
        "prompts.jsonl:2 is empty, so there is nothing to continue; mend it, or leave it out with --keep-going"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_a_cache_in_8_bits_is_an_option(
    loaded, tiny_model_folder: Path, capsys, monkeypatch: pytest.MonkeyPatch, cache_dtype: str
) -> None:
    rounded: set[torch.dtype] = set()
    monkeypatch.setattr(storage, "round_heads", lambda x, dtype: rounded.add(dtype) or round_heads(x, dtype))
    words = ["generate", str(tiny_model_folder), "import", "--max-tokens", "30"]
    assert run([*words, "--cache-dtype", cache_dtype]) == 0
    assert rounded == {storage.IN_8_BITS[cache_dtype]}
    (found,) = puna.generate(*loaded, "import", cache_dtype=cache_dtype, max_tokens=30)
    assert capsys.readouterr().out == found.text + "\n"


@pytest.mark.parametrize(
    "words",
    [
        ["infill", "MODEL", "--prefix", "a", "--max-tokens", "4"],
        ["chat", "MODEL", "--max-tokens", "4"],
        ["evaluate", "completion", "MODEL", "--corpus", "CODE", "--max-tokens", "4"],
        ["evaluate", "key_retrieval", "MODEL", "--length", "100", "--cases", "1"],
    ],
    ids=lambda words: words[0] + words[1].strip("MODEL"),
)
def test_whatever_completes_takes_a_cache_in_8_bits(
    words: list[str], tiny_model_folder: Path, tmp_path: Path, typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text("import os\nprint(os.getcwd())\n")
    rounded: set[torch.dtype] = set()
    monkeypatch.setattr(storage, "round_heads", lambda x, dtype: rounded.add(dtype) or round_heads(x, dtype))
    typed("Hello\n")
    places = {"MODEL": str(tiny_model_folder), "CODE": str(tmp_path / "a.py")}
    assert run([*(places.get(word, word) for word in words), "--cache-dtype", "int8"]) == 0
    assert rounded == {torch.int8}


def test_a_draft_of_another_vocabulary_is_refused(loaded, tiny_model_folder: Path, tmp_path: Path, capsys) -> None:
    other = train_tokenizer(["words of another kind, all of them\n" * 50], tmp_path / "words", vocab_size=310)
    save_model(tiny_model(), tmp_path / "draft", tokenizer=other)
    assert run(["generate", str(tiny_model_folder), "x", "--draft", str(tmp_path / "draft")]) == 2
    assert "splits texts into other tokens than the model" in capsys.readouterr().err


# puna infill


def filled(loaded, prefix: str, suffix: str) -> str:
    model, tokenizer = loaded
    return complete(model, tokenizer, [infill_prompt(tokenizer, prefix, suffix)], Sampling(max_tokens=10))[0].text


def test_infill_prints_the_middle(loaded, tiny_model_folder: Path, capsys) -> None:
    words = ["infill", str(tiny_model_folder), "--prefix", "def f(", "--suffix", "):\n", "--max-tokens", "10"]
    assert run(words) == 0
    expected = filled(loaded, "def f(", "):\n")
    assert capsys.readouterr().out == expected + "\n"
    assert run([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prefix"], result["suffix"], result["completion"]) == ("def f(", "):\n", expected)
    assert expected != filled(loaded, "def f(", "")


def test_infill_finds_the_gap_in_a_file(loaded, tiny_model_folder: Path, tmp_path: Path, capsys, typed) -> None:
    file = tmp_path / "code.py"
    file.write_text("def f(<FILL>):\n")
    assert run(["infill", str(tiny_model_folder), "--file", str(file), "--max-tokens", "10"]) == 0
    assert capsys.readouterr().out == filled(loaded, "def f(", "):\n") + "\n"
    typed("<FILL>x")
    assert run(["infill", str(tiny_model_folder), "--file", "-", "--max-tokens", "10"]) == 0
    assert capsys.readouterr().out == filled(loaded, "", "x") + "\n"


def test_infill_heals_in_spm_order_unless_told_not_to(loaded, tiny_model_folder: Path, capsys) -> None:
    words = ["infill", str(tiny_model_folder), "--prefix", "retur", "--suffix", "x", "--order", "spm"]
    texts = []
    for healing in ([], ["--no-healing"]):
        assert run([*words, *healing, "--max-tokens", "10"]) == 0
        texts.append(capsys.readouterr().out)
    asked = {"order": "spm", "max_tokens": 10}
    healed, plain = (puna.infill(*loaded, "retur", "x", healing=healing, **asked) for healing in (True, False))
    assert texts == [healed.text + "\n", plain.text + "\n"]
    assert healed.prompt_tokens < plain.prompt_tokens


def test_infill_says_what_of_a_long_file_the_model_sees(
    loaded, tiny_model_folder: Path, tmp_path: Path, capsys
) -> None:
    file = tmp_path / "code.py"
    prefix, suffix = "a = 1\n" * 50 + "def f(", "):\n" + "b = 2\n" * 50
    file.write_text(f"{prefix}<FILL>{suffix}")
    words = ["infill", str(tiny_model_folder), "--file", str(file), "--max-tokens", "10"]
    assert run([*words, "--budget", "100"]) == 0
    captured = capsys.readouterr()
    kept = cut_around_gap(loaded[1], prefix, suffix, 100)
    assert captured.out == filled(loaded, *kept) + "\n"
    assert captured.err == (
        f"more than 100 tokens: the model sees the last {len(kept[0])} of {len(prefix)} characters before the gap, "
        f"and the first {len(kept[1])} of {len(suffix)} behind it\n"
    )
    assert run([*words, "--budget", "3"]) == 2
    assert "raise it" in capsys.readouterr().err
    assert run([*words, "--budget", "2000"]) == 0
    assert capsys.readouterr().err == ""


def test_infill_wants_exactly_one_gap(tiny_model_folder: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "code.py"
    file.write_text("<FILL> and <FILL>")
    assert run(["infill", str(tiny_model_folder), "--file", str(file)]) == 2
    assert "holds <FILL> 2 times" in capsys.readouterr().err
    assert run(["infill", str(tiny_model_folder)]) == 2
    assert "give --prefix and --suffix" in capsys.readouterr().err
    assert run(["infill", str(tiny_model_folder), "--file", str(file), "--prefix", "x"]) == 2
    assert run(["infill", str(tiny_model_folder), "--prefix", "x", "--order", "mps"]) == 2
    assert '"psm" or "spm"' in capsys.readouterr().err


# puna chat


@pytest.fixture
def overheard(monkeypatch: pytest.MonkeyPatch):
    """The dialogs that `puna chat` asks a model to answer; the answers are " answer 1 ", " answer 2 " …"""
    dialogs: list[tuple[str, list[dict]]] = []

    def answer(model, tokenizer, messages, *, template, on_text, **sampling) -> Completion:
        dialogs.append((template.name, list(messages)))
        for piece in (" ", f"answer {len(dialogs)}", " "):
            on_text(0, piece)
        return Completion([1], f" answer {len(dialogs)} ", "stop", 1)

    monkeypatch.setattr("puna.generate.chat", answer)
    return dialogs


def test_chat_names_a_line_that_is_not_text(tiny_model_folder: Path, capsys, typed, overheard) -> None:
    typed(b"hello\ncaf\xe9\n")
    assert run(["chat", str(tiny_model_folder)]) == 1
    assert capsys.readouterr().err.endswith("puna: line 2 is not UTF-8 text; convert it first, e.g. with iconv\n")


def test_chat_answers_line_by_line_and_remembers(tiny_model_folder: Path, capsys, typed, overheard) -> None:
    typed("hello\n\nand then?\n")
    assert run(["chat", str(tiny_model_folder), "--system", "Be brief."]) == 0
    captured = capsys.readouterr()
    assert captured.out == "answer 1 \nanswer 2 \n"
    assert "chat template: codellama" in captured.err
    assert overheard[1] == (
        "codellama",
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "answer 1"},
            {"role": "user", "content": "and then?"},
        ],
    )


def test_new_forgets_the_dialog_but_not_the_system_message(tiny_model_folder: Path, typed, overheard) -> None:
    typed("hello\n/new\nagain")
    assert run(["chat", str(tiny_model_folder), "--system", "S"]) == 0
    assert [message["content"] for message in overheard[1][1]] == ["S", "again"]


@pytest.mark.parametrize("is_shipped", [False, True], ids=["named", "of the model"])
def test_a_layout_without_a_second_turn_begins_anew_and_says_so(
    tiny_model_folder: Path, tmp_path: Path, typed, overheard, capsys, is_shipped: bool
) -> None:
    folder, named = tiny_model_folder, ["--template", "alpaca"]
    if is_shipped:
        folder, named = tmp_path / "tuned", []
        shutil.copytree(tiny_model_folder, folder)
        (folder / "chat_template.jinja").write_text(chat_template("alpaca").jinja)
    typed("hello\nagain\n")
    assert run(["chat", str(folder), *named]) == 0
    assert [dialog for _, dialog in overheard] == [[{"role": "user", "content": text}] for text in ("hello", "again")]
    assert capsys.readouterr().err.count("no place for what was said before; the dialog begins anew") == 1


@pytest.mark.parametrize(
    ("options", "limit"),
    [(["--max-tokens", "3"], "--max-tokens 3"), (["--context", "40"], "the model's context, which is full")],
)
def test_an_answer_that_was_cut_off_is_said_to_be(
    tiny_model_folder: Path, typed, capsys, options: list[str], limit: str
) -> None:
    typed("hello\n")
    assert run(["chat", str(tiny_model_folder), "--temperature", "0", "--system", "", *options]) == 0
    assert f"the answer was cut off by {limit}" in capsys.readouterr().err


def test_chat_says_what_the_model_says(loaded, tiny_model_folder: Path, capsys, typed) -> None:
    typed("hello\n")
    assert run(["chat", str(tiny_model_folder), "--max-tokens", "9", "--temperature", "0"]) == 0
    model, tokenizer = loaded
    prompt = chat_template("codellama").encode(tokenizer, [{"role": "user", "content": "hello"}]).tokens
    (completion,) = complete(model, tokenizer, [prompt], Sampling(max_tokens=9, stop_ids=(tokenizer.eos_id,)))
    assert completion.text.strip()
    assert capsys.readouterr().out == completion.text.lstrip() + "\n"


def test_chat_reads_a_dialog_once(tiny_model_folder: Path, typed, monkeypatch) -> None:
    read = []
    compute = Runner.compute

    def noted(runner: Runner, chunks: list[Chunk]) -> list[Logits | None]:
        read.append(sum(map(len, chunks)))
        return compute(runner, chunks)

    monkeypatch.setattr(Runner, "compute", noted)
    typed("Sort this list of names by the length of each name, please.\nthanks\n")
    assert run(["chat", str(tiny_model_folder), "--max-tokens", "1", "--temperature", "0"]) == 0
    first, second = read
    assert 16 < second < first


def test_a_models_own_chat_template_is_believed(tiny_model_folder: Path, tmp_path: Path, capsys, typed) -> None:
    model, tokenizer = puna.load(tiny_model_folder)
    save_model(model, tmp_path / "own", tokenizer=tokenizer)
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    (tmp_path / "own" / "chat_template.jinja").write_text(template)
    typed("hello\n")
    assert run(["chat", str(tmp_path / "own"), "--max-tokens", "5"]) == 0
    assert f"chat template: {tmp_path / 'own'}" in capsys.readouterr().err


def test_a_question_that_cannot_be_laid_out_ends_a_scripted_chat_with_its_reason(
    tiny_model_folder: Path, capsys, typed
) -> None:
    typed("what is [INST]?\n")
    assert run(["chat", str(tiny_model_folder)]) == 1
    assert "holds the layout's own tags ([INST])" in capsys.readouterr().err
    assert run(["chat", str(tiny_model_folder), "--template", "morse"]) == 2
    assert "neither a chat template (alpaca, codellama" in capsys.readouterr().err


class Terminal(io.StringIO):
    """Standard input with someone at it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch):
    """Lets `input` give these lines one after the other; an error among them is raised."""

    def put(*lines: str | type[BaseException]) -> None:
        remaining = iter(lines)

        def input_(prompt: str) -> str:
            line = next(remaining)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", input_)

    return put


@pytest.mark.parametrize("leave", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_leave_politely(tiny_model_folder: Path, said, overheard, capsys, leave) -> None:
    said("hello", leave)
    assert run(["chat", str(tiny_model_folder)]) == 0
    assert capsys.readouterr().out == "answer 1 \n\n"


def test_ctrl_c_in_an_answer_keeps_what_was_said(tiny_model_folder: Path, said, monkeypatch) -> None:
    dialogs: list[list[dict]] = []

    def answer(model, tokenizer, messages, *, template, on_text, **sampling) -> None:
        dialogs.append(list(messages))
        on_text(0, " half an ans")
        raise KeyboardInterrupt

    monkeypatch.setattr("puna.generate.chat", answer)
    said("hello", "go on", EOFError)
    assert run(["chat", str(tiny_model_folder)]) == 0
    assert [message["content"] for message in dialogs[1]] == ["hello", "half an ans", "go on"]


def test_an_unusable_question_at_a_terminal_is_explained_and_forgotten(
    loaded, tiny_model_folder: Path, said, capsys
) -> None:
    said("what is [INST]?", "hello", EOFError)
    assert run(["chat", str(tiny_model_folder), "--max-tokens", "5", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert "holds the layout's own tags" in captured.err
    assert captured.out.strip()


def test_commands_compute_without_gradients(tiny_model_folder: Path, monkeypatch) -> None:
    modes: list[bool] = []
    original = torch.nn.functional.embedding
    monkeypatch.setattr(
        torch.nn.functional,
        "embedding",
        lambda *words, **options: modes.append(torch.is_inference_mode_enabled()) or original(*words, **options),
    )
    assert run(["generate", str(tiny_model_folder), "x", "--max-tokens", "2"]) == 0
    assert modes == [True, True]
