r"""MBPP: Python functions to write from a sentence and three tests, after three solved examples in the same layout.

    prompt    You are an expert Python programmer, and here is your task: Write … [BEGIN]\n…\n[DONE]
              … two more examples, then the task up to [BEGIN]            (tasks 2, 3 and 4 are the examples)
    answer    def remove_Occ(s, ch): …                                    cut before [DONE]
    test      assert remove_Occ("hello", "l") == "heo"

Scored are the tasks 11 to 510, the paper's test set, as far as the file has them. The sanitized file is a subset with
clearer sentences and mended tests, and lies in the same layout. An Instruct model is asked without examples.

Source: Program Synthesis with Large Language Models (arXiv:2108.07732), section 3.1, for layout, examples and split;
Code Llama (arXiv:2308.12950), Table 2 and Figure 13; https://github.com/google-research/google-research/tree/master/mbpp.
"""

import ast
from pathlib import Path
from typing import Any

from puna.errors import PunaError
from puna.evaluate.answers import parsed
from puna.evaluate.completing import Ask
from puna.evaluate.paper import table
from puna.evaluate.programs import Programs, Task
from puna.evaluate.samples import Sample, read_lines
from puna.evaluate.sandbox import Job, Limits
from puna.files import read_any_json

#: The solved examples, and the tasks that are scored.
EXAMPLES = (2, 3, 4)
SCORED = range(11, 511)

#: The examples' numbers where the file has not all of those, as the sanitized one: its first ones before `SCORED`.
SHOTS = 3

LAYOUT = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
)

QUESTION = (
    "Your task is to write a Python function to solve a programming problem.\n"
    "The Python code must be between [PYTHON] and [/PYTHON] tags.\n"
    "You are given one example test from which you can infer the function signature.\n"
    "Problem: {text}\nTest: {test}"
)

#: Variant -> file.
FILES = {"full": "mbpp.jsonl", "sanitized": "sanitized-mbpp.json"}

#: What each line of the full file has.
FIELDS = {"task_id": int, "text": str, "code": str, "test_list": list}

#: Table 2.
FIGURES = {
    "full": table(
        "pass@1 pass@10 pass@100",
        {
            "7B": "41.4 66.7 82.5",
            "13B": "47.0 71.7 87.1",
            "34B": "55.0 76.2 86.6",
            "70B": "62.4 81.1 91.9",
            "Instruct 7B": "44.4 65.4 76.8",
            "Instruct 13B": "49.4 71.2 84.1",
            "Instruct 34B": "57.0 74.6 85.4",
            "Instruct 70B": "62.2 79.6 89.2",
            "Python 7B": "47.6 70.3 84.8",
            "Python 13B": "49.0 74.0 87.6",
            "Python 34B": "56.2 76.4 88.2",
            "Python 70B": "65.6 81.5 91.9",
        },
    )
}


class MBPP(Programs):
    """See the module."""

    name = "mbpp"
    files = FILES
    where = "https://github.com/google-research/google-research/tree/master/mbpp has it"
    stops = ("[DONE]", "\n[BEGIN]", "\nYou are an expert")
    fields = FIELDS
    limits = Limits(cpu_seconds=10, wall_seconds=24)  # the solution of task 123 takes 2 to 4 seconds by machine
    figures = FIGURES

    def read(self, path: Path) -> dict[str, Task]:
        """The tasks that are scored, of the full file or the sanitized one; see `Programs`."""
        every = read_all(path)
        return {task_id: task for task_id, task in every.items() if task["task_id"] in SCORED}

    def variant(self, path: Path) -> str:
        """By the form of the file, whatever it is called."""
        return "sanitized" if path.suffix == ".json" else "full"

    def ask(self, task: Task) -> Ask:
        """Three solved examples and the task; or a question."""
        shots = "".join(f"{_layout(example)}{example['code'].strip()}\n[DONE]\n\n" for example in task["examples"])
        return Ask(shots + _layout(task), question=QUESTION.format(text=task["text"], test=task["test_list"][0]))

    def function(self, task: Task) -> str:
        """The function that the tests call."""
        return _names(task)[0]

    def sample(self, task: Task, text: str, *, is_chat: bool) -> Sample:
        """A whole program, always: no prompt stands before it in the file."""
        sample = super().sample(task, text, is_chat=is_chat)
        return Sample(task.task_id, sample.text, is_whole=True)

    def job(self, task: Task, sample: Sample) -> Job:
        """See `Programs`; the reference solution's imports and classes serve the tests, its function does not."""
        function, *classes = _names(task)
        return Job(
            program=sample.text,
            entry_point=function,
            classes=tuple(classes),
            setup="\n".join([*task["imports"], task["code"]]),
            test="\n".join([task["setup"], *task["test_list"]]),
        )


def read_all(path: Path) -> dict[str, Task]:
    """Every task of the full file, or of the sanitized one, those that are not scored too.

    Raises:
        PunaError: as for `Programs.read`.
    """
    lines = _sanitized(path) if path.suffix == ".json" else [line for _, line in read_lines(path, FIELDS)]
    known = {line["task_id"]: line for line in lines}
    shots = [known[i] for i in EXAMPLES if i in known]
    if len(shots) < SHOTS:
        shots = [line for line in lines if line["task_id"] not in SCORED][:SHOTS]
    examples = [_fields(line) for line in shots]
    return {str(line["task_id"]): Task(str(line["task_id"]), {**_fields(line), "examples": examples}) for line in lines}


def _sanitized(path: Path) -> list[dict[str, Any]]:
    lines = read_any_json(path)
    needed = ("task_id", "prompt", "code", "test_list")
    if not isinstance(lines, list) or not all(isinstance(line, dict) and line.keys() >= set(needed) for line in lines):
        raise PunaError(f"{path} is no sanitized MBPP: it must be a list of objects with {', '.join(needed)}")
    return [line | {"text": line["prompt"]} for line in lines]


def _fields(line: dict[str, Any]) -> dict[str, Any]:
    return {
        "task_id": line["task_id"],
        "text": line["text"],
        "code": line["code"].replace("\r\n", "\n"),
        "test_list": line["test_list"],
        "setup": (line.get("test_setup_code") or "").replace("\r\n", "\n"),
        "imports": line.get("test_imports") or [],
    }


def _layout(task: Any) -> str:
    return LAYOUT.format(text=task["text"], tests="\n".join(task["test_list"]))


def _names(task: Task) -> list[str]:
    """The function of the reference solution that the tests call, then its classes that they use."""
    code = parsed(task["code"])
    tests = parsed("\n".join([task["setup"], *task["test_list"]]))
    if code is None or tests is None:
        raise PunaError(f"MBPP's task {task.task_id} is damaged: its code or its tests are not Python")
    used = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name)}
    defined = [node for node in code.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in used]
    functions = [node.name for node in defined if isinstance(node, ast.FunctionDef)]
    if len(functions) != 1:
        raise PunaError(f"MBPP's task {task.task_id} tests {len(functions)} functions of its solution; one is expected")
    return functions + [node.name for node in defined if isinstance(node, ast.ClassDef)]


evaluate = MBPP().evaluate
