"""HumanEval: right answers pass, wrong ones do not, bad files are named."""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from puna.devices import cpu_cores
from puna.errors import PunaError, UsageError
from puna.evaluate import evaluate
from puna.evaluate.answers import cut
from puna.evaluate.benchmarks.humaneval import STOPS, HumanEval
from puna.evaluate.completing import Ask, OnAnswer
from puna.evaluate.programs import Task
from puna.evaluate.samples import Sample, read_samples
from puna.evaluate.sandbox import Job, Limits, Sandbox
from tests.evaluate.conftest import judged

BENCHMARK = HumanEval()


def job(task: Task, completion: str) -> Job:
    return BENCHMARK.job(task, Sample(task.task_id, completion))


#: Two tasks in the official file's form; the second test uses a function of the prompt.
TASKS = [
    {
        "task_id": "Tiny/0",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('a') == 'aa'\n",
        "canonical_solution": "    return x * 2\n",
    },
    {
        "task_id": "Tiny/1",
        "prompt": 'def shift(s):\n    return s[1:] + s[:1]\n\ndef unshift(s):\n    """Undoes shift."""\n',
        "entry_point": "unshift",
        "test": "def check(candidate):\n    assert candidate(shift('abc')) == 'abc'\n",
        "canonical_solution": "    return s[-1:] + s[:-1]\n",
    },
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "Tiny.jsonl.gz", TASKS)


def write_lines(path: Path, lines: list[Any]) -> Path:
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.writelines(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    return path


def official(shared: Path) -> list[dict[str, str]]:
    with gzip.open(shared / "data/humaneval/HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


# ---- the official tasks


def test_all_canonical_solutions_pass(shared: Path, bubblewrap: str, tmp_path: Path) -> None:
    samples = [{"task_id": t["task_id"], "completion": t["canonical_solution"]} for t in official(shared)]
    result = evaluate(
        "humaneval",
        samples=write_lines(tmp_path / "samples.jsonl", samples),
        data=shared / "data/humaneval/HumanEval.jsonl.gz",
        output=tmp_path / "run",
    )
    records = [json.loads(line) for line in (tmp_path / "run/details.jsonl").read_text().splitlines()]
    failed = [record for record in records if record["verdict"] != "passed"]
    assert failed == []
    assert (result["tasks"], result["samples"], result["verdicts"]["passed"], result["pass@1"]) == (164, 164, 164, 1.0)
    assert "pass@10" not in result
    assert result["data"]["sha256"] == "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"


def test_no_wrong_solution_passes(shared: Path, sandbox: Sandbox) -> None:
    tasks = BENCHMARK.read(shared / "data/humaneval/HumanEval.jsonl.gz")
    judgements = judged(sandbox, [job(task, "    return 'wrong'\n") for task in tasks.values()])
    assert [judgement.verdict for judgement in judgements] == ["wrong"] * 164


# ---- small ones


def test_samples_are_scored_and_the_result_says_how(data: Path, bubblewrap: str, tmp_path: Path) -> None:
    right = {task["task_id"]: task["canonical_solution"] for task in TASKS}
    lines = [{"task_id": "Tiny/0", "completion": right["Tiny/0"]}] * 3
    lines += [
        {"task_id": "Tiny/0", "completion": "    return 3\n"},
        {"task_id": "Tiny/1", "completion": "    return (\n"},
    ]
    lines += [{"task_id": "Tiny/1", "completion": right["Tiny/1"], "extra": 1}]
    samples = write_lines(tmp_path / "s.jsonl", lines)
    result = evaluate("humaneval", samples=samples, data=data, output=tmp_path / "run")
    assert json.loads(json.dumps(result)) == result
    assert result["benchmark"] == "humaneval"
    assert result["pass@1"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert (result["tasks"], result["samples"]) == (2, 6)
    assert {verdict: count for verdict, count in result["verdicts"].items() if count} == {
        "passed": 4,
        "wrong": 1,
        "error": 1,
    }
    assert re.match(r"bubblewrap \d\S*, all namespaces, uid [1-9]\d*, Python 3", result["sandbox"])
    records = [json.loads(line) for line in (tmp_path / "run/details.jsonl").read_text().splitlines()]
    assert [record["verdict"] for record in records] == ["passed"] * 3 + ["wrong", "error", "passed"]
    assert "assert candidate(2) == 4" in records[3]["detail"]
    assert "SyntaxError" in records[4]["detail"]


def test_a_model_completes_the_prompts_as_they_are_and_is_cut_at_the_stop_strings(
    data: Path, bubblewrap: str, tmp_path: Path
) -> None:
    asked: list[str] = []
    known = {task["prompt"]: task["canonical_solution"] for task in TASKS}

    def complete(asks: Sequence[Ask], seeds: Sequence[int], on_answer: OnAnswer) -> None:
        for number, ask in enumerate(asks):
            asked.append(ask.prefix)
            on_answer(number, known[ask.prefix] + "\nprint('more' +\n")

    output = tmp_path / "run"
    result = evaluate("humaneval", complete=complete, data=data, output=output)
    assert result["pass@1"] == 1.0
    assert asked == [task["prompt"] for task in TASKS]
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [(sample["task_id"], sample["completion"]) for sample in samples] == [
        (task["task_id"], task["canonical_solution"]) for task in TASKS
    ]
    again = evaluate("humaneval", samples=output / "samples.jsonl", data=data)
    assert again["verdicts"] == result["verdicts"]


def test_a_model_in_memory_is_scored(data: Path, bubblewrap: str, tmp_path: Path) -> None:
    from puna import load
    from puna.testing import write_tiny_model

    model, tokenizer = load(write_tiny_model(tmp_path / "model"))
    result = evaluate("humaneval", model, tokenizer=tokenizer, data=data, max_tokens=4)
    assert (result["pass@1"], result["samples"], result["cut_prompts"]) == (0.0, 2, 0)


@pytest.mark.parametrize("stop", STOPS)
def test_a_completion_ends_before_every_stop_string(stop: str) -> None:
    assert cut(f"    return 1{stop} and more", STOPS) == "    return 1"
    assert cut("    return 1\n    if x:\n        # y\n", STOPS) == "    return 1\n    if x:\n        # y\n"
    assert cut(f"a{stop}b\nclass", STOPS) == "a"


# ---- bad input


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"s.jsonl, line 2: not JSON"),
        ("[1]", r"s.jsonl, line 2: nothing usable under task_id"),
        ('{"task_id": "Tiny/0"}', r"s.jsonl, line 2: no text under completion or solution"),
        ('{"task_id": "Tiny/0", "completion": ["x"]}', r"s.jsonl, line 2: no text under completion or solution"),
        ('{"task_id": "Tiny/9", "completion": "x"}', r"s.jsonl, line 2: there is no task 'Tiny/9'"),
        ("", r"s.jsonl has no sample for 1 of 2 tasks, Tiny/1 among them"),
    ],
)
def test_a_bad_line_of_samples_is_named(line: str, message: str, data: Path, tmp_path: Path) -> None:
    samples = write_lines(tmp_path / "s.jsonl", [{"task_id": "Tiny/0", "completion": "x"}, line])
    with pytest.raises(PunaError, match=message):
        read_samples(samples, BENCHMARK.read(data))


def test_a_damaged_or_missing_file_is_named(data: Path, tmp_path: Path) -> None:
    cut_off = tmp_path / "cut.jsonl.gz"
    cut_off.write_bytes(data.read_bytes()[:-20])
    with pytest.raises(PunaError, match=r"cut.jsonl.gz is damaged or cut off"):
        BENCHMARK.read(cut_off)
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    with pytest.raises(PunaError, match=r"plain.jsonl.gz is damaged"):
        BENCHMARK.read(tmp_path / "plain.jsonl.gz")
    with pytest.raises(PunaError, match=r"none.jsonl does not exist"):
        read_samples(tmp_path / "none.jsonl", BENCHMARK.read(data))
    with pytest.raises(PunaError, match=r"holds no tasks"):
        evaluate("humaneval", samples="s.jsonl", data=write_lines(tmp_path / "empty.jsonl", []))


def test_samples_are_read_in_their_order(data: Path, tmp_path: Path) -> None:
    lines = [{"task_id": f"Tiny/{i % 2}", "completion": str(i)} for i in range(4)]
    found = read_samples(write_lines(tmp_path / "s.jsonl", lines), BENCHMARK.read(data))
    assert found == [Sample(f"Tiny/{i % 2}", str(i)) for i in range(4)]


def test_without_the_data_file_the_message_says_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PUNA_DATA", raising=False)
    with pytest.raises(UsageError, match=r"github.com/openai/human-eval .*--data.* PUNA_DATA"):
        evaluate("humaneval", samples=tmp_path / "s.jsonl")
    monkeypatch.setenv("PUNA_DATA", str(tmp_path))
    with pytest.raises(
        PunaError, match=rf"{tmp_path}/HumanEval.jsonl.gz does not exist; .*github.com/openai/human-eval"
    ):
        evaluate("humaneval", samples=tmp_path / "s.jsonl")


def test_either_a_model_or_samples_are_scored(data: Path, tmp_path: Path) -> None:
    given: dict[str, Any]
    for given in ({}, {"samples": "s.jsonl", "complete": lambda asks, seeds: []}):
        with pytest.raises(UsageError, match="either a model or a file of samples"):
            evaluate("humaneval", data=data, **given)


@pytest.mark.parametrize(
    "opening",
    [
        '    """Adds."""\n',
        "    total = 0\n    for item in items:\n",
        "    try:\n        return items[0]\n",
        "    items = 1\n",
    ],
)
def test_a_prompt_that_ends_anywhere_gives_the_test_its_helpers(opening: str) -> None:
    prompt = f"def helper():\n    return 7\n\n\ndef f(items):\n{opening}"
    task = Task("x/0", {"prompt": prompt, "entry_point": "f", "test": "def check(f): pass"})
    names: dict[str, Any] = {}
    exec(job(task, "    pass\n").setup, names)
    assert names["helper"]() == 7


BUSY = "while True: pass"


def test_a_score_is_the_same_on_three_runs_while_others_use_every_core(shared: Path, bubblewrap: str) -> None:
    tasks = list(BENCHMARK.read(shared / "data/humaneval/HumanEval.jsonl.gz").values())[::12]
    jobs = [job(task, task["canonical_solution"]) for task in tasks]
    jobs += [job(task, "    return 'wrong'\n") for task in tasks[:3]]
    jobs.append(job(tasks[0], "    while True: pass\n"))
    expected = ["passed"] * len(tasks) + ["wrong"] * 3 + ["timeout"]
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(cpu_cores())]
    try:
        with Sandbox(Limits(cpu_seconds=1, wall_seconds=20)) as sandbox:
            for _ in range(3):
                assert [judgement.verdict for judgement in judged(sandbox, jobs)] == expected
    finally:
        for other in others:
            other.kill()
            other.wait()
