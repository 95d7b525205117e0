"""A model that processes share: scores, answers and messages are those of one process, and the first one speaks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from puna.cli import run
from puna.errors import UsageError
from puna.evaluate import evaluate
from puna.testing import write_tiny_model, write_tiny_tasks


def test_scores_of_two_processes_are_those_of_one(
    tmp_path: Path, tiny_model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text("import os\n\n\ndef f():\n    return os.getcwd()\n")
    alone = evaluate("completion", str(tiny_model_folder), corpus=tmp_path / "code", max_tokens=3, device="cpu")
    capfd.readouterr()
    command = ["evaluate", "completion", str(tiny_model_folder), "--corpus", str(tmp_path / "code")]
    command += ["--max-tokens", "3", "--device", "cpu", "-o", str(tmp_path / "out"), "--json", "--nproc", "2"]
    assert run(command) == 0
    printed, said = capfd.readouterr()
    shared = json.loads(printed)
    assert shared == json.loads((tmp_path / "out/result.json").read_text())
    assert shared["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-5)
    apart = {"seconds", "bits_per_byte", "intervals"}
    assert {k: v for k, v in shared.items() if k not in apart} == {k: v for k, v in alone.items() if k not in apart}
    assert len((tmp_path / "out/cases.jsonl").read_text().splitlines()) == 3
    assert said.count("2/2 lines") == 1


def test_answers_of_two_processes_are_judged_by_the_first_and_gone_on_with(
    bubblewrap: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models = [str(write_tiny_model(tmp_path / name, seed=seed)) for seed, name in enumerate(("a", "b"))]
    data = write_tiny_tasks(tmp_path / "tasks.jsonl")
    options: dict[str, Any] = {"protocol": "sample", "samples_per_task": 3, "max_tokens": 6, "device": "cpu"}
    expected = [evaluate("humaneval", model, data=data, output=tmp_path / "one", **options) for model in models[:1]]
    command = ["evaluate", "humaneval", *models, "--data", str(data), "--protocol", "sample", "-n", "3"]
    command += ["--max-tokens", "6", "--device", "cpu", "-o", str(tmp_path / "two"), "--json", "--nproc", "2"]
    assert run(command) == 0
    printed, said = capfd.readouterr()
    first, second = json.loads(printed)["results"]
    assert {**first, "seconds": 0} == {**expected[0], "seconds": 0}
    assert (second["model"], second["samples"]) == (models[1], 12)
    assert said.count("report: ") == 1
    folders = (tmp_path / "one", next((tmp_path / "two").glob("*_a")))
    answers = []
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        answers.append({(line["task_id"], line["number"]): line["completion"] for line in lines})
    assert answers[0] == answers[1]
    assert len(set(answers[0].values())) > 3
    some = (folders[1] / "samples.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "samples.jsonl").write_text("".join(some[:5]))
    assert run([*command[:2], models[0], *command[4:-4], str(folders[1]), "--nproc", "2"]) == 0
    assert "completing: 7/7 answers" in capfd.readouterr().err
    assert sorted((folders[1] / "samples.jsonl").read_text().splitlines(keepends=True)) == sorted(some)


def test_what_the_first_process_alone_finds_wrong_ends_all_with_one_message(
    tmp_path: Path, tiny_model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.py").write_text("import os\nprint(os.getcwd())\n")
    command = ["evaluate", "completion", str(tiny_model_folder), "--corpus", str(tmp_path / "a.py"), "--device", "cpu"]
    assert run([*command, "-o", str(tmp_path / "a.py"), "--nproc", "2"]) == 1
    printed, said = capfd.readouterr()
    assert printed == ""
    assert said.count("a.py is a file; name a folder") == 1
    assert "Traceback" not in said


#: Scores thrice: into a file, without a sandbox, and as it should be.
SCORING = """
import json, os, sys
import torch.distributed as dist
from puna.errors import PunaError
from puna.evaluate import evaluate

model, corpus, tasks = sys.argv[1:]
dist.init_process_group("gloo")
os.environ["PATH"] = ""  # nothing is found there, and no bubblewrap
for benchmark, options in (
    ("completion", {"corpus": corpus, "output": corpus}),
    ("humaneval", {"data": tasks}),
    ("completion", {"corpus": corpus}),
):
    try:
        result = evaluate(benchmark, model, max_tokens=3, device="cpu", **options)
        said = result["benchmark"]
    except PunaError as error:
        said = str(error)
    sys.stdout.write(json.dumps([dist.get_rank(), said]) + "\\n")
    sys.stdout.flush()
dist.destroy_process_group()
"""


def test_what_keeps_the_first_process_from_beginning_is_an_error_of_all_after_which_they_go_on(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    (code := tmp_path / "a.py").write_text("import os\nprint(os.getcwd())\n")
    (script := tmp_path / "scoring.py").write_text(SCORING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    words = map(str, (tiny_model_folder, code, write_tiny_tasks(tmp_path / "tasks.jsonl")))
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for rank in range(2):
        unwritable, without_sandbox, result = (message for of, message in said if of == rank)
        assert "a.py is a file; name a folder" in unwritable
        assert "bubblewrap" in without_sandbox
        assert result == "completion"


def test_processes_that_have_not_been_joined_load_no_model_each(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"2 processes were started together; join them first, .*init_process_group"):
        evaluate("completion", str(tiny_model_folder), corpus=tmp_path, device="cpu")


def test_processes_that_have_nothing_to_share_are_refused(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--samples", "s.jsonl"], ["--server", "http://x"], []):
        assert run(["evaluate", "humaneval", *words, "--nproc", "2"]) == 2
        assert "--nproc is for a model that computes here; leave it out" in capsys.readouterr().err
    assert run(["evaluate", "completion", str(tiny_model_folder), "--corpus", ".", "--nproc", "3"]) == 2
    assert "--nproc=3" in capsys.readouterr().err
    with pytest.raises(UsageError, match="completion has no option nproc"):
        evaluate("completion", str(tiny_model_folder), corpus=".", nproc=2)
