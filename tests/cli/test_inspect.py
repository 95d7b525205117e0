"""`puna inspect` shows a row as the model sees it, and says what is wrong when it cannot."""

import json

import numpy as np
import pytest

from puna.cli import run
from puna.data.rows import IGNORE
from puna.data.shards import DATASET_FILE, shard_entry, write_shard
from puna.files import write_json
from puna.tokenizer import Tokenizer, train_tokenizer

PROMPT, ANSWER, SECOND = "question:\tx?", " answer\x1b[31m ü", "second [bold]document[/bold]"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = ["question: answer document\n second [bold] ü x? y! z;\n"] * 20
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=320)


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """A prepared folder of two dialogs; in the first only the answer is learnt."""
    folder = tmp_path_factory.mktemp("prepared")
    prompt = tokenizer.encode(PROMPT, bos=True)
    answer = tokenizer.encode(ANSWER, eos=True, leading_space=False)
    second = tokenizer.encode(SECOND, bos=True, eos=True)
    with write_shard(folder / "shard-00000.arrow", dialogs=True) as writer:
        is_target = [False] * len(prompt) + [True] * len(answer)
        writer.add("dialog-0", "a\x07.json", np.array(prompt + answer, np.int32), np.array(is_target))
        writer.add("dialog-1", "b.json", np.array(second, np.int32), np.ones(len(second), np.bool_))
    entry = shard_entry(folder / "shard-00000.arrow", writer)
    write_json(folder / DATASET_FILE, {"format": 1, "shards": [entry], "fill": "whole-documents"})
    tokenizer.save(folder / "tokenizer")
    return folder


def test_json_holds_the_row_and_nothing_else_is_printed(folder, tokenizer, capsys):
    assert run(["inspect", str(folder), "--json", "--sequence-length", "100"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert err == ""
    prompt = tokenizer.encode(PROMPT, bos=True)
    answer = tokenizer.encode(ANSWER, eos=True, leading_space=False)
    second = tokenizer.encode(SECOND, bos=True, eos=True)
    lengths = [len(prompt) + len(answer), len(second)]
    padding = 100 - sum(lengths)
    assert padding > 0
    assert shown["tokens"] == prompt + answer + second + [0] * padding
    asked = [IGNORE] * (len(prompt) - 1) + answer + [IGNORE] + second[1:] + [IGNORE] * (padding + 1)
    assert shown["targets"] == asked
    assert shown["documents"] == [0] * lengths[0] + [1] * lengths[1] + [2] * padding
    assert shown["positions"] == [*range(lengths[0]), *range(lengths[1]), *range(padding)]
    assert shown["pieces"] == [tokenizer.piece(token) for token in shown["tokens"]]
    assert shown["parts"] == [
        {"document": 0, "id": "dialog-0", "source": "a\x07.json", "tokens": lengths[0], "targets": len(answer)},
        {"document": 1, "id": "dialog-1", "source": "b.json", "tokens": lengths[1], "targets": len(second) - 1},
    ]
    assert (shown["row"], shown["rows"], shown["fill"]) == (0, 1, "whole-documents")
    assert shown["useful_tokens_share"] == sum(lengths) / 100


def test_a_line_a_token_and_the_text_of_each_document_are_shown(folder, tokenizer, capsys):
    assert run(["inspect", str(folder), "--sequence-length", "100"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].split() == ["place", "document", "position", "token", "piece", "target", "piece"]
    assert lines[1].split() == ["0", "0", "0", str(tokenizer.bos_id), "<s>", "-"]
    n_prompt = len(tokenizer.encode(PROMPT, bos=True))
    first = tokenizer.encode(ANSWER, leading_space=False)[0]
    assert lines[n_prompt].split()[-2:] == [str(first), tokenizer.piece(first)]
    texts = lines[101:]
    assert texts[0] == ""
    assert texts[1].startswith(f"document 0 · 0 of {folder} · dialog-0 · a\\x07.json · ")
    assert texts[2:5] == [" read    <s> question:\\tx?", " learnt   answer\\x1b[31m ü</s>", ""]
    assert texts[5].startswith(f"document 1 · 1 of {folder} · dialog-1 · b.json · ")
    assert texts[6:9] == [" read    <s>", " learnt   second [bold]document[/bold]</s>", ""]
    assert texts[9].startswith("the last ")
    assert "tokens are padding; row 0 of 1 rows of 100 tokens, whole-documents" in texts[9]


def test_colours_are_for_terminals_and_control_characters_of_the_data_for_nobody(folder, capsys, monkeypatch):
    run(["inspect", str(folder), "--sequence-length", "100"])
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    run(["inspect", str(folder), "--sequence-length", "100"])
    coloured = capsys.readouterr().out
    assert "\x1b[32m" in coloured
    assert "\x1b[31m" not in coloured
    assert "\x07" not in coloured


def test_row_length_and_filling_can_be_chosen(folder, tokenizer, capsys):
    run(["inspect", str(folder), "--sequence-length", "7", "--row", "-1", "--fill", "end-to-end", "--json"])
    shown = json.loads(capsys.readouterr().out)
    total = sum(len(tokenizer.encode(t)) for t in (PROMPT, SECOND)) + len(tokenizer.encode(ANSWER, leading_space=False))
    total += 4  # two BOS, two EOS
    assert shown["rows"] == -(-total // 7)
    assert shown["row"] == shown["rows"] - 1
    assert shown["tokens"][(total - 1) % 7] == tokenizer.eos_id
    run(["inspect", str(folder), "--sequence-length", "7", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["rows"], shown["cut_documents"], shown["cut_tokens"]) == (2, 2, total - 14)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--row", "5"], 2, "has no row 5; there are 0 to 0: 1 rows of 1,024 tokens"),
        (["--sequence-length", "1"], 2, "sequence_length is 1"),
        (["--sequence-length", "99999999"], 2, "is longer than the 42 tokens of "),
        (["--fill", "tetris"], 2, "choose one of end-to-end, whole-documents"),
    ],
)
def test_what_cannot_be_shown_is_explained(folder, capsys, arguments, code, message):
    assert run(["inspect", str(folder), *arguments]) == code
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_folder_that_is_not_prepared_is_named(tmp_path, capsys):
    assert run(["inspect", str(tmp_path)]) == 1
    assert f"{tmp_path} is not a prepared folder" in capsys.readouterr().err
