"""`puna evaluate`: one JSON object, exit codes, and messages that name the way out."""

import json
import re
from pathlib import Path

import pytest

import puna
from puna.cli import run
from puna.errors import UsageError
from puna.evaluate import benchmarks
from puna.evaluate.sandbox import VERDICTS
from puna.testing import write_tiny_model, write_tiny_tasks


def test_samples_give_one_json_object_and_nothing_else_on_stdout(
    bubblewrap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_tasks(tmp_path / "data.jsonl", 1)
    (tmp_path / "s.jsonl").write_text(json.dumps({"task_id": "Tiny/0", "completion": "    return x - x"}))
    command = ["evaluate", "humaneval", "--samples", str(tmp_path / "s.jsonl"), "--data", str(tmp_path / "data.jsonl")]
    assert run([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["benchmark"], result["pass@1"], result["tasks"]) == ("humaneval", 1.0, 1)
    assert run(command) == 0
    assert re.search(r"^pass@1 +1\.0000$", capsys.readouterr().out, re.MULTILINE)


def test_a_folder_is_loaded_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_model(tmp_path / "model")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text("import os\nprint(os.getcwd())\n")
    options = ["--corpus", str(tmp_path / "code"), "--max-tokens", "2", "--device", "cpu"]
    assert run(["evaluate", "completion", str(model), *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result)[:2] == ["benchmark", "model"]
    assert (result["model"], result["cases"], result["documents"]) == (str(model), 1, 1)
    assert 0 < result["bits_per_byte"] < 20
    assert run(["evaluate", "completion", str(model), *options, "-o", str(tmp_path / "out")]) == 0
    for shown in (capsys.readouterr().out, (tmp_path / "out/report.html").read_text()):
        assert "max_tokens 2" in shown
        assert "None" not in shown  # what was not given


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nothing"], 2, "there is no benchmark 'nothing'; there are completion, humaneval"),
        (["completion", "--samples", "s.jsonl"], 2, "completion has no option samples; it has"),
        (["humaneval", "--corpus", "."], 2, "humaneval has no option corpus; it has"),
        (["completion", "nowhere", "--corpus", "."], 1, "there is no folder nowhere"),
        (["humaneval", "--server", "localhost:8000", "--data", "TASKS"], 2, "begin it with http:// or https://"),
        (
            ["humaneval", "--samples", "nofile", "--data", "TASKS"],
            1,
            "nofile does not exist; name a file of JSON lines",
        ),
        (["humaneval", "--samples", ".", "--data", "TASKS"], 1, ". is a folder; name a file of JSON lines"),
        (
            ["humaneval", "--samples", "s.jsonl", "--data", "nowhere.gz"],
            1,
            "nowhere.gz does not exist; https://github.com/openai/human-eval",
        ),
    ],
)
def test_a_wrong_request_is_answered_in_a_line(
    words: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = str(write_tiny_tasks(tmp_path / "tasks.jsonl"))
    assert run(["evaluate", *(word.replace("TASKS", tasks) for word in words)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["humaneval", "MODEL", "--data", "nofile"], "nofile does not exist"),
        (["multipl_e", "MODEL", "--data", "TASKS", "--variant", "c"], "multipl_e has no variant 'c'; it has cpp, js"),
        (["multipl_e", "MODEL", "--data", "BASH"], "need bash, which is not installed; on Debian and Ubuntu: apt-get"),
        (["humaneval", "MODEL", "--data", "TASKS", "--template", "none"], "none is neither a chat template (alpaca"),
        (["humaneval", "MODEL", "--data", "TASKS", "--order", "mps"], '"psm" or "spm", not \'mps\''),
        (["humaneval", "--samples", "s", "--data", "TASKS", "--cache-dtype", "int8"], "leave --cache-dtype out"),
        (["humaneval", "MODEL", "--data", "TASKS", "--protocol", "x"], "there is no protocol 'x'"),
        (["humaneval", "MODEL", "--data", "TASKS", "--output", "TASKS"], "is a file; name a folder"),
        (["completion", "MODEL", "--corpus", "nowhere"], "nowhere does not exist"),
        (["completion", "MODEL", "--corpus", "TASKS", "--output", "TASKS"], "is a file; name a folder"),
        (["completion", "MODEL"], "completion needs files that the model has not seen: --corpus DIR"),
        (["completion", "MODEL", "--corpus", "TASKS", "--cache-dtype", "int3"], "int8 or fp8, not in 'int3'"),
        (["perplexity", "MODEL", "--corpus", "nowhere"], "nowhere does not exist"),
        (["perplexity", "MODEL", "--corpus", "TASKS", "--cache-dtype", "int8"], "perplexity has no option cache_dtype"),
        (["key_retrieval", "MODEL", "--corpus", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_is_wrong_beside_the_model_is_said_before_it_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()  # no model: loading it would say so
    task = {"name": "a", "language": "sh", "prompt": "", "tests": "", "stop_tokens": []}
    (tmp_path / "bash.jsonl").write_text(json.dumps(task))
    places = {
        "MODEL": str(tmp_path / "empty"),
        "TASKS": str(write_tiny_tasks(tmp_path / "tasks.jsonl", 1)),
        "BASH": str(tmp_path / "bash.jsonl"),
    }
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert run(["evaluate", *(places.get(word, word) for word in words)]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the model has no tokenizer; .*puna.load_tokenizer"):
        puna.evaluate("completion", object(), corpus=".")


def test_every_file_of_the_folder_is_a_benchmark() -> None:
    for name in benchmarks.names():
        assert callable(benchmarks.find(name).evaluate)


def test_the_guide_lists_every_benchmark_and_every_verdict() -> None:
    guide = (Path(puna.__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    listed = [name for line in guide.splitlines() if line.startswith("| `") for name in [line.split("`")[1]]]
    assert sorted(listed) == benchmarks.names()
    table = guide.partition("## Verdicts")[2].partition("\n\nPrograms")[0]
    assert all(verdict in table for verdict in VERDICTS)


def test_the_file_of_another_benchmark_is_refused_with_where_to_get_the_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_tasks(tmp_path / "tasks.jsonl")
    assert run(["evaluate", "infilling", str(tmp_path), "--data", str(tmp_path / "tasks.jsonl")]) == 1
    what, whence = capsys.readouterr().err.splitlines()
    assert "tasks.jsonl, line 1: nothing usable under suffix" in what
    assert "is it infilling's official file? https://github.com/openai/human-eval-infilling" in whence
