"""HumanEval: 164 Python functions to complete from signature and docstring, judged by their tests.

    prompt        def add(x, y): …docstring…                        the model sees this, as it is
    completion        return x + y                                  cut before the first of `STOPS`
    test          def check(candidate): assert candidate(2, 3) == 5

The program that is judged is prompt + completion; the test runs beside it, never in it (`puna.evaluate.sandbox`).

Source: Evaluating Large Language Models Trained on Code (arXiv:2107.03374); data and sample format of
https://github.com/openai/human-eval; stop strings and the unstripped prompt of bigcode-evaluation-harness, which Code
Llama's authors point to (github.com/facebookresearch/codellama, issues 72 and 104).
"""

import ast
import contextlib
import gzip
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import PunaError, UsageError
from puna.evaluate.completing import Completer
from puna.evaluate.pass_at_k import scores
from puna.evaluate.sandbox import VERDICTS, Job, Judgement, Limits, Sandbox
from puna.files import file_aside, sha256_of
from puna.progress import Progress, say

#: Where the official file is found when `data` is not given: this name in the folder that PUNA_DATA names.
DATA_FILE = "HumanEval.jsonl.gz"

#: A completion ends before the first of these.
STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")

#: Bodies that make a prompt whole: behind a docstring, inside a loop or branch, behind a `try`.
STUBS = ("    pass", "        pass", "    finally:\n        pass")


@dataclass(frozen=True)
class Task:
    """One line of the official file."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


@dataclass(frozen=True)
class Sample:
    """One line of a file of samples."""

    task_id: str
    completion: str


def evaluate(
    *,
    model: Any = None,
    tokenizer: Any = None,
    samples: Path | str | None = None,
    data: Path | str | None = None,
    output: Path | str | None = None,
    details: Path | str | None = None,
    complete: Callable[[list[str]], list[str]] | None = None,
    batch: int = 8,
    max_tokens: int = 512,
    limits: Limits = Limits(),
    workers: int | None = None,
) -> dict[str, Any]:
    """Share of HumanEval's functions that are completed so that their tests pass.

    Args:
        model: completes greedily, with `tokenizer`.
        tokenizer: the model's.
        samples: instead of a model, JSON lines with `task_id` and `completion`; any number a task, at least one.
        data: the official file; by default `DATA_FILE` in the folder PUNA_DATA.
        output: where the model's completions go, as samples.
        details: where the verdict on every sample goes, as JSON lines.
        complete: instead of a model, a function from prompts to completions.
        batch: how many prompts the model completes at once.
        max_tokens: a completion's greatest length.
        limits: what one judgement may use.
        workers: how many judgements run at once; by default one a core.

    Returns:
        `{"benchmark", "pass@1", "pass@10"…, "tasks", "samples", "verdicts": {verdict: count}, "sandbox", …}`.
    """
    if sum(given is not None for given in (model, samples, complete)) != 1:
        raise UsageError("humaneval scores either a model or a file of samples; give one of them")
    path = _data_file(data)
    tasks = read_tasks(path)
    with Sandbox(limits, workers=workers) as sandbox:  # before the model works for hours: is there one?
        started = time.monotonic()
        if samples is not None:
            attempts = read_samples(samples, tasks)
        else:
            if complete is None:
                complete = Completer(model, tokenizer, max_tokens=max_tokens, stop=STOPS, batch_rows=batch)
            attempts = _completed(tasks, complete, batch)
        if output is not None:
            _write_lines(output, ({"task_id": a.task_id, "completion": a.completion} for a in attempts))
        generated = time.monotonic()
        judgements = _judged(sandbox, tasks, attempts)
        judged = time.monotonic()
    if details is not None:
        _write_lines(details, (_record(*pair) for pair in zip(attempts, judgements, strict=True)))
    verdicts = Counter(judgement.verdict for judgement in judgements)
    if verdicts["sandbox"]:
        first = next(j for j in judgements if j.verdict == "sandbox")
        say(f"{verdicts['sandbox']} samples count as failed though the sandbox is at fault; the first: {first.detail}")
    return {
        "benchmark": "humaneval",
        **scores(_counts(attempts, judgements)),
        "tasks": len(tasks),
        "samples": len(attempts),
        "verdicts": {verdict: verdicts[verdict] for verdict in VERDICTS},
        "sandbox": sandbox.mechanism,
        "limits": vars(limits),
        **({"cut_prompts": complete.cut_prompts} if isinstance(complete, Completer) else {}),
        "data": {"file": path.name, "sha256": sha256_of(path)},
        "seconds": {"completing": round(generated - started, 3), "judging": round(judged - generated, 3)},
    }


def read_tasks(path: Path | str) -> dict[str, Task]:
    """The tasks of the official file, by their ids.

    Raises:
        PunaError: the file is missing, cut off, or a line is no task; the message names file and line.
    """
    fields = ("task_id", "prompt", "entry_point", "test")
    tasks = {line["task_id"]: Task(*(line[name] for name in fields)) for _, line in _lines(Path(path), fields)}
    if not tasks:
        raise PunaError(f"{path} holds no tasks; get the official file: {_GET_DATA}")
    return tasks


def read_samples(path: Path | str, tasks: dict[str, Task]) -> list[Sample]:
    """The samples of a file, every task having at least one.

    Raises:
        PunaError: a line is no sample or of no task (the message names it), or tasks have none.
    """
    samples = []
    for number, line in _lines(Path(path), ("task_id", "completion")):
        if line["task_id"] not in tasks:
            raise PunaError(
                f"{path}, line {number}: there is no task {line['task_id']!r}; there is {next(iter(tasks))!r} …"
            )
        samples.append(Sample(line["task_id"], line["completion"]))
    missing = sorted(tasks.keys() - {sample.task_id for sample in samples})
    if missing:
        raise PunaError(
            f"{path} has no sample for {len(missing)} of {len(tasks)} tasks, {missing[0]} among them; "
            "a score over some of the tasks would compare with no other"
        )
    return samples


def job(task: Task, completion: str) -> Job:
    """A sample as the sandbox takes it; on the test's side, the prompt's other functions are those of the prompt."""
    return Job(
        program=task.prompt + completion + "\n",
        entry_point=task.entry_point,
        setup=_with_stub(task.prompt),
        test=f"{task.test}\n\ncheck({task.entry_point})\n",
    )


def cut(completion: str) -> str:
    """A completion up to the first stop string."""
    return completion[: min((at for stop in STOPS if (at := completion.find(stop)) >= 0), default=len(completion))]


# ---- the steps

_GET_DATA = (
    "https://github.com/openai/human-eval has it (data/HumanEval.jsonl.gz); "
    "name it with --data, or its folder with the environment variable PUNA_DATA"
)


def _data_file(data: Path | str | None) -> Path:
    folder = os.environ.get("PUNA_DATA")
    path = Path(data) if data is not None else Path(folder) / DATA_FILE if folder else None
    if path is None:
        raise UsageError(f"humaneval needs its official data file: {_GET_DATA}")
    if not path.is_file():
        raise PunaError(f"{path} does not exist; {_GET_DATA}")
    return path


def _completed(tasks: dict[str, Task], complete: Callable[[list[str]], list[str]], batch: int) -> list[Sample]:
    """One completion a task; prompts of similar length go together, so that little is padded."""
    order = sorted(tasks.values(), key=lambda task: len(task.prompt))
    texts = {}
    with Progress("completing", len(order), "tasks") as progress:
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            for task, text in zip(some, complete([task.prompt for task in some]), strict=True):
                texts[task.task_id] = cut(text)
            progress.advance(len(some))
    return [Sample(task_id, texts[task_id]) for task_id in tasks]


def _judged(sandbox: Sandbox, tasks: dict[str, Task], attempts: list[Sample]) -> list[Judgement]:
    """The judgement on every sample; equal ones are judged once."""
    different = list(dict.fromkeys(attempts))
    with Progress("judging", len(different), "samples") as progress:
        jobs = [job(tasks[sample.task_id], sample.completion) for sample in different]
        judgements = sandbox.judge_all(jobs, done=lambda _: progress.advance())
    by_sample = dict(zip(different, judgements, strict=True))
    return [by_sample[sample] for sample in attempts]


def _counts(attempts: list[Sample], judgements: list[Judgement]) -> Iterator[tuple[int, int]]:
    passed: dict[str, list[bool]] = defaultdict(list)
    for sample, judgement in zip(attempts, judgements, strict=True):
        passed[sample.task_id].append(judgement.verdict == "passed")
    return ((len(verdicts), sum(verdicts)) for verdicts in passed.values())


def _record(sample: Sample, judgement: Judgement) -> dict[str, Any]:
    return {
        "task_id": sample.task_id,
        "completion": sample.completion,
        "passed": judgement.verdict == "passed",
        "verdict": judgement.verdict,
        "detail": judgement.detail,
        "seconds": round(judgement.seconds, 3),
    }


def _lines(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """The JSON objects of a file, plain or gzipped, with their line numbers; each has `fields`, all text."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, _line(text, fields, f"{path}, line {number}")
    except FileNotFoundError:
        raise PunaError(f"{path} does not exist") from None
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise PunaError(f"{path} is damaged or cut off ({error}); fetch it again") from None


def _line(text: str, fields: tuple[str, ...], where: str) -> dict[str, str]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise PunaError(f"{where}: not JSON ({error}); each line must be an object with {', '.join(fields)}") from None
    lacking = [name for name in fields if not isinstance(line, dict) or not isinstance(line.get(name), str)]
    if lacking:
        raise PunaError(
            f"{where}: no text under {', '.join(lacking)}; each line must be an object with {', '.join(fields)}"
        )
    return line


def _write_lines(path: Path | str, records: Iterator[dict[str, Any]]) -> None:
    with file_aside(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _with_stub(prompt: str) -> str:
    """A prompt made whole, so that what it defines beside the function asked for is there: a body that does nothing."""
    wholes = [f"{prompt}\n{stub}\n" for stub in STUBS]
    for whole in wholes:
        with contextlib.suppress(SyntaxError):
            ast.parse(whole)
            return whole
    return wholes[0]
