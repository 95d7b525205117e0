"""MBPP, infilling and HumanEval+: canonical solutions pass, wrong ones do not, prompts are the papers'."""

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from puna.errors import PunaError, UsageError
from puna.evaluate import evaluate
from puna.evaluate.benchmarks import mbpp
from puna.evaluate.benchmarks.humaneval import HumanEval
from puna.evaluate.benchmarks.humaneval_plus import CHECK, HumanEvalPlus
from puna.evaluate.benchmarks.infilling import Infilling
from puna.evaluate.benchmarks.mbpp import MBPP
from puna.evaluate.programs import Programs, Task
from puna.evaluate.samples import Sample, read_lines
from puna.evaluate.sandbox import Job, Sandbox
from puna.testing import ScriptedModel
from puna.tokenizer import Tokenizer
from tests.evaluate.conftest import judged

FULL, SANITIZED = "data/mbpp/mbpp_open.jsonl", "data/mbpp/sanitized_mbpp_open.json"
SINGLE_LINE = "data/infilling/HumanEval-SingleLineInfilling.jsonl.gz"
LIGHT = "data/infilling/HumanEval-RandomSpanInfillingLight.jsonl.gz"


def read(benchmark: Programs, path: Path) -> list[Task]:
    return list((mbpp.read_all(path) if isinstance(benchmark, MBPP) else benchmark.read(path)).values())


def canonical(benchmark: Programs, task: Task) -> Sample:
    if isinstance(benchmark, MBPP):
        return Sample(task.task_id, task["code"], is_whole=True)
    return Sample(task.task_id, task["canonical_solution"])


SETS = [(MBPP(), FULL, 724), (MBPP(), SANITIZED, 298), (Infilling(), SINGLE_LINE, 1033), (Infilling(), LIGHT, 164)]


@pytest.mark.parametrize(("benchmark", "path", "count"), SETS)
def test_one_canonical_solution_in_twelve_passes(
    shared: Path, sandbox: Sandbox, benchmark: Programs, path: str, count: int
) -> None:
    tasks = read(benchmark, shared / path)
    assert len(tasks) == count
    jobs = [benchmark.job(task, canonical(benchmark, task)) for task in tasks[::12]]
    assert Counter(judgement.verdict for judgement in judged(sandbox, jobs)) == {"passed": len(jobs)}


@pytest.mark.slow
@pytest.mark.parametrize(("benchmark", "path", "count"), SETS)
def test_every_canonical_solution_passes(
    shared: Path, bubblewrap: str, benchmark: Programs, path: str, count: int
) -> None:
    jobs = [benchmark.job(task, canonical(benchmark, task)) for task in read(benchmark, shared / path)]
    with Sandbox(benchmark.limits) as sandbox:
        assert Counter(judgement.verdict for judgement in judged(sandbox, jobs)) == {"passed": count}


@pytest.mark.slow
def test_ten_thousand_judgements_leave_no_process_no_mount_and_no_file(shared: Path, bubblewrap: str) -> None:
    def things() -> list[set[str]]:
        processes = {path.name for path in Path("/proc").iterdir() if path.name.isdigit() and _is_bwrap(path)}
        files = {str(path) for path in Path(tempfile.gettempdir()).glob("puna-sandbox-*")}
        return [processes, files, set(Path("/proc/self/mounts").read_text().splitlines()), set(os.listdir("/dev/shm"))]

    tasks = HumanEval().read(shared / "data/humaneval/HumanEval.jsonl.gz").values()
    jobs = [HumanEval().job(task, canonical(HumanEval(), task)) for task in tasks] * 61
    before = things()
    with Sandbox() as sandbox:
        assert Counter(judgement.verdict for judgement in judged(sandbox, jobs)) == {"passed": 10_004}
    time.sleep(1)
    assert [now - then for now, then in zip(things(), before, strict=True)] == [set()] * 4


def _is_bwrap(process: Path) -> bool:
    try:
        return b"inside.main" in (process / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize("path", [FULL, SANITIZED])
def test_no_function_without_an_answer_passes_mbpp(shared: Path, sandbox: Sandbox, path: str) -> None:
    benchmark = MBPP()
    tasks = read(benchmark, shared / path)[::10]
    jobs = [
        benchmark.job(task, Sample(task.task_id, f"def {benchmark.function(task)}(*_):\n    return '?'\n", True))
        for task in tasks
    ]
    assert "passed" not in {judgement.verdict for judgement in judged(sandbox, jobs)}


def test_the_lines_that_infilling_asks_for_are_needed(shared: Path, sandbox: Sandbox) -> None:
    benchmark = Infilling()
    tasks = read(benchmark, shared / SINGLE_LINE)[::30]
    jobs = [benchmark.job(task, Sample(task.task_id, "    raise ValueError\n")) for task in tasks]
    found = Counter(judgement.verdict for judgement in judged(sandbox, jobs))
    assert found["passed"] <= 1  # a line or two of the set is not reached by any test
    assert found["error"] > len(tasks) / 2


# ---- MBPP


def test_mbpp_is_asked_with_the_papers_three_examples_and_layout(shared: Path) -> None:
    tasks = MBPP().read(shared / FULL)
    assert list(tasks)[:1] == ["11"]
    assert len(tasks) == 250  # of the 500 of the test set, those that this file has
    prompt = MBPP().ask(tasks["11"]).prefix
    assert prompt.count("You are an expert Python programmer, and here is your task: ") == 4
    assert prompt.count("\n[DONE]\n\n") == 3
    assert "\r" not in prompt
    first, *_, last = prompt.split("[DONE]\n\n")
    assert first.startswith(
        "You are an expert Python programmer, and here is your task: Write a function to find the similar elements "
        "from the given two tuple lists. Your code should pass these tests:\n\n"
        "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)\n"
    )
    assert "\n[BEGIN]\ndef similar_elements(test_tup1, test_tup2):\n" in first
    assert last.endswith("\n[BEGIN]\n")
    assert "Write a python function to remove first and last occurrence" in last


def test_what_a_model_writes_for_mbpp_ends_before_done_and_is_a_whole_program(shared: Path) -> None:
    task = MBPP().read(shared / FULL)["11"]
    sample = MBPP().sample(task, "def remove_Occ(s, c):\n    return s\n[DONE]\n\nYou are", is_chat=False)
    assert sample == Sample("11", "def remove_Occ(s, c):\n    return s\n", is_whole=True)
    sample = MBPP().sample(task, "[PYTHON]\ndef remove_Occ(s, c):\n    return s\n[/PYTHON] So.", is_chat=True)
    assert sample == Sample("11", "def remove_Occ(s, c):\n    return s\n", is_whole=True)


def test_a_folder_named_once_serves_every_benchmark(
    shared: Path, bubblewrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [line for _, line in read_lines(shared / FULL, {}) if line["task_id"] < 13]
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([task | {"prompt": task["text"]} for task in tasks]))
    samples = [{"task_id": str(task["task_id"]), "solution": task["code"]} for task in tasks if task["task_id"] > 10]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    monkeypatch.setenv("PUNA_DATA", str(tmp_path))
    for variant in ("full", "sanitized"):
        result = evaluate("mbpp", samples=tmp_path / "samples.jsonl", variant=variant)
        assert (result["variant"], result["tasks"], result["pass@1"]) == (variant, 2, 1.0)
    assert evaluate("mbpp", samples=tmp_path / "samples.jsonl")["paper"]["7B"]["pass@1"] == 0.414


def test_the_paper_has_no_figures_for_the_sanitized_file_whatever_it_is_called() -> None:
    assert "7B" in MBPP().paper(Path("somewhere/mbpp_open.jsonl"), "psm")
    assert MBPP().paper(Path("somewhere/sanitized_mbpp_open.json"), "psm") == {}


def test_a_damaged_file_of_mbpp_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('[{"task_id": 11}]')
    with pytest.raises(PunaError, match=r"s.json is no sanitized MBPP: it must be a list of objects with task_id"):
        MBPP().read(tmp_path / "s.json")


# ---- objects of the program's own, as MBPP's tests use them

NODES = """
class Node:
    def __init__(self, data): self.data, self.left = data, None
    def __eq__(self, other): return True
def depth(node): return 0 if node is None else 1 + depth(node.left)
def found(node): return node if node.data else None
"""


@pytest.mark.parametrize(
    ("function", "test", "verdict"),
    [
        ("depth", "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)\nassert depth(root) == 3", "passed"),
        ("depth", "assert Node(7).data == 7\nassert depth(None) == 0", "passed"),
        ("depth", "assert depth([Node(1)][0]) == 2", "wrong"),
        ("depth", "assert Node(1) == Node(2)", "wrong"),
        ("depth", "assert Node(1) == 1", "wrong"),
        ("depth", "assert Node(1).nothing", "error"),
        ("found", "assert found(Node(1))\nassert not found(Node(0))", "passed"),
        ("found", "assert found(Node(1)) == 1", "wrong"),
        ("found", "assert 1 == found(Node(1))", "wrong"),
        ("found", "assert found(Node(1)) in [1, 2]", "wrong"),
        ("found", "assert [1] == [found(Node(1))]", "wrong"),
        ("found", "assert len(found(Node(1))) or True", "wrong"),
        ("found", "assert isinstance(found(Node(1)), int)", "wrong"),
    ],
)
def test_an_object_of_the_program_is_made_read_and_set_but_never_compared(
    sandbox: Sandbox, function: str, test: str, verdict: str
) -> None:
    judgement = sandbox.judge(Job(NODES, function, test, classes=("Node",)))
    assert judgement.verdict == verdict, judgement


# ---- infilling


def test_infilling_asks_for_the_gap_and_takes_one_line_where_one_is_missing(shared: Path) -> None:
    benchmark = Infilling()
    line = read(benchmark, shared / SINGLE_LINE)[0]
    ask = benchmark.ask(line)
    assert (ask.prefix, ask.suffix) == (line["prompt"], line["suffix"])
    assert benchmark.sample(line, "    x = 1\n    y = 2\n", is_chat=False).text == "    x = 1\n"
    span = read(benchmark, shared / LIGHT)[0]
    assert benchmark.sample(span, "a\nb", is_chat=False).text == "a\nb"
    assert benchmark.variant(shared / SINGLE_LINE) == "single-line"
    assert benchmark.variant(shared / LIGHT) == "random-span-light"


def test_gaps_in_one_solution_are_of_one_problem() -> None:
    first, second, other = (Task(f"SingleLineInfilling/HumanEval/{name}", {}) for name in ("0/L0", "0/L1", "1/L0"))
    assert Infilling().problem(first) == Infilling().problem(second) != Infilling().problem(other)


def test_the_papers_figure_is_that_of_the_order_of_the_prompt(shared: Path, bubblewrap: str, tmp_path: Path) -> None:
    task = read(Infilling(), shared / SINGLE_LINE)[0]
    path = tmp_path / "HumanEval-SingleLineInfilling.jsonl"
    path.write_text(json.dumps(dict(task.fields)) + "\n")
    (tmp_path / "s.jsonl").write_text(json.dumps(canonical(Infilling(), task).record()))
    figures = {order: evaluate("infilling", samples=tmp_path / "s.jsonl", data=path, order=order)["paper"]["7B"]
               for order in ("psm", "spm")}  # fmt: skip
    assert figures == {"psm": {"pass@1": 0.741}, "spm": {"pass@1": 0.833}}


@pytest.mark.parametrize("benchmark", ["infilling", "multipl_e", "humaneval_x"])
def test_what_is_no_question_is_not_asked_in_chat(benchmark: str) -> None:
    with pytest.raises(UsageError, match=f"{benchmark} asks for what is missing .* leave --template out"):
        evaluate(benchmark, samples="s.jsonl", template="codellama")


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_a_gap_is_filled_in_as_puna_infill_does(tiny_model_folder: Path, order: Literal["psm", "spm"]) -> None:
    import puna
    from puna.evaluate.completing import Ask, Completer

    model, tokenizer = puna.load(tiny_model_folder)
    completer = Completer(model, tokenizer, max_tokens=6, stop=(), batch_rows=4, order=order)
    lines = "value = 1\n" * model.config.max_position_embeddings
    gaps = [("a = 1\n", "b = 2\n"), ("import numpy as np\nimp", "\n"), (lines, "b = 2\n"), (lines, lines)]
    answers = completer([Ask(*gap) for gap in gaps])
    assert answers == [puna.infill(model, tokenizer, *gap, order=order, max_tokens=6).text for gap in gaps]
    assert completer.cut_prompts == 2


def test_the_lines_next_to_a_gap_stay_and_in_spm_order_the_word_at_its_edge_is_split_anew(
    code_llama_tokenizer: Tokenizer,
) -> None:
    from puna.evaluate.completing import Ask, Completer

    model = ScriptedModel([1], prompt_tokens=1)
    model.config = replace(model.config, max_position_embeddings=128)
    far = "far = 1\n" * 200
    ask = Ask(f"{far}near = 1\nimp", f"\nnext = 1\n{far}")
    for order, begins_with in (("psm", b""), ("spm", b"imp")):
        completer = Completer(model, code_llama_tokenizer, max_tokens=28, stop=(), batch_rows=1, order=order)
        tokens, sampling = completer._asked(ask)
        text = code_llama_tokenizer.decode(tokens)
        assert 90 < len(tokens) <= 100
        assert ("near = 1" in text, "next = 1" in text, completer.cut_prompts) == (True, True, 1)
        assert (sampling.begins_with, text.endswith("imp")) == (begins_with, False)


# ---- HumanEval+


def plus_task(**changes: Any) -> Task:
    fields = {
        "task_id": "HumanEval/0",
        "prompt": "def mean(xs):\n",
        "entry_point": "mean",
        "canonical_solution": "    return sum(xs) / len(xs)\n",
        "base_input": [[[1, 2]]],
        "plus_input": [[[0.1, 0.2, 0.3]]],
        "atol": 0,
    }
    return Task("HumanEval/0", fields | changes)


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("    return sum(xs) / len(xs)\n", "passed"),
        ("    return sum(x / len(xs) for x in xs)\n", "passed"),  # not the same float, but close
        ("    return 1.5\n", "wrong"),  # right for the base input alone
        ("    xs.clear()\n    return 1.5\n", "wrong"),
        ("    return [sum(xs) / len(xs)]\n", "wrong"),
    ],
)
def test_humaneval_plus_compares_with_the_canonical_solution(sandbox: Sandbox, completion: str, verdict: str) -> None:
    judgement = sandbox.judge(HumanEvalPlus().job(plus_task(), Sample("HumanEval/0", completion)))
    assert judgement.verdict == verdict, judgement


def test_humaneval_plus_asks_whether_a_root_is_one_and_is_exact_where_answers_are_not_floats(sandbox: Sandbox) -> None:
    root = {
        "prompt": "def find_zero(xs):\n",
        "entry_point": "find_zero",
        "canonical_solution": "    return -0.5\n",
        "base_input": [[[1, 2]]],
        "plus_input": {},
        "atol": 1e-4,
    }
    for answer, verdict in (("-0.50001", "passed"), ("-0.6", "wrong")):
        job = HumanEvalPlus().job(plus_task(**root), Sample("HumanEval/0", f"    return {answer}\n"))
        assert sandbox.judge(job).verdict == verdict
    infinite = {"base_input": [[[float("inf"), 1]]]}
    job = HumanEvalPlus().job(plus_task(**infinite), Sample("HumanEval/0", "    return sum(xs) / len(xs)\n"))
    assert sandbox.judge(job).verdict == "passed"
    whole = {"canonical_solution": "    return 10 ** 9\n"}
    job = HumanEvalPlus().job(plus_task(**whole), Sample("HumanEval/0", "    return 10 ** 9 + 1\n"))
    assert sandbox.judge(job).verdict == "wrong"


def by_evalplus(expected: Sequence[Any], found: Sequence[Any], tolerance: float) -> bool:
    """Whether all answers pass: EvalPlus' own comparison, as `unsafe_execute` spells it."""

    def is_floats(x: Any) -> bool:
        return isinstance(x, float) or (isinstance(x, list | tuple) and bool(x) and all(type(i) is float for i in x))

    for exp, out in zip(expected, found, strict=True):
        exact_match = out == exp
        if tolerance == 0 and is_floats(exp):
            tolerance = 1e-6
        try:
            if not exact_match and tolerance != 0:
                assert type(out) is type(exp)
                if isinstance(exp, list | tuple):
                    assert len(out) == len(exp)
                assert np.allclose(out, exp, rtol=1e-07, atol=tolerance)
            else:
                assert exact_match
        except (AssertionError, TypeError, ValueError):
            return False
    return True


#: Canonical answers and a program's, tolerance.
ANSWERS: list[tuple[list[Any], list[Any], float]] = [
    ([1], [1.0], 0),
    ([1.5], [1.5 + 1e-7], 0),
    ([1.5], [1.5 + 3e-6], 0),
    ([1e9], [1e9 + 50], 0),
    ([2.0000001], [2], 0),  # another type
    ([[]], [()], 0),
    ([[0.5, 1.5]], [(0.5, 1.5)], 0),
    ([[0.5, 1.5]], [[0.5, 1.5 + 1e-8]], 0),
    ([[0.5, 1.5]], [[0.5]], 0),
    ([[0.5, 1]], [[0.5 + 1e-8, 1]], 0),  # not all floats, and no tolerance
    ([[0.5, 1]], [[0.5 + 1e-8, 1]], 1e-4),
    ([0.5, 10**9], [0.5, 10**9 + 1], 0),  # the tolerance of the first answer stays
    ([10**9, 0.5], [10**9 + 1, 0.5], 0),
    ([float("inf")], [1.0], 0),
    ([float("inf")], [float("inf")], 0),
    ([1.0], [float("inf")], 0),
    ([float("nan")], [float("nan")], 0),
    (["a"], ["a"], 1e-4),
    (["a"], ["b"], 1e-4),
    ([["a", 1.0]], [["a", 1.0 + 1e-9]], 1e-4),  # is compared number by number, or not at all
    ([None], [1.0], 1e-4),
    ([True], [False], 1e-4),
    ([[[0.5], [1.5]]], [[[0.5], [1.5 + 1e-9]]], 1e-4),
]


@pytest.mark.parametrize(("expected", "found", "tolerance"), ANSWERS)
def test_humaneval_plus_compares_as_evalplus_does(expected: list[Any], found: list[Any], tolerance: float) -> None:
    names: dict[str, Any] = {"answer_within": lambda seconds: None}
    exec(CHECK, names)
    inputs = [[i] for i in range(len(expected))]
    try:
        names["check"](found.__getitem__, expected.__getitem__, inputs, tolerance, False)
        passed = True
    except AssertionError:
        passed = False
    assert passed == by_evalplus(expected, found, tolerance)


def test_humaneval_plus_gives_an_answer_a_second_and_a_program_a_minute(sandbox: Sandbox) -> None:
    job = HumanEvalPlus().job(plus_task(), Sample("HumanEval/0", "    import time; time.sleep(9)\n"))
    judgement = sandbox.judge(job)
    assert (judgement.verdict, judgement.detail) == ("timeout", "no answer after 1 s")
    assert judgement.seconds < 4
    assert HumanEvalPlus().limits.cpu_seconds == 60


def test_a_complex_number_is_no_root(sandbox: Sandbox) -> None:
    root = {"prompt": "def find_zero(xs):\n", "entry_point": "find_zero", "canonical_solution": "    return -0.5\n"}
    task = plus_task(**root, base_input=[[[1, 0, 1]]], plus_input=[], atol=1e-4)
    assert sandbox.judge(HumanEvalPlus().job(task, Sample("HumanEval/0", "    return 1j\n"))).verdict == "wrong"


def test_humaneval_plus_is_read_from_evalplus_file(bubblewrap: str, tmp_path: Path) -> None:
    (tmp_path / "HumanEvalPlus.jsonl").write_text(json.dumps(dict(plus_task().fields)))
    (tmp_path / "s.jsonl").write_text(json.dumps({"task_id": "HumanEval/0", "solution": "def mean(xs): return 1.5"}))
    result = evaluate("humaneval_plus", samples=tmp_path / "s.jsonl", data=tmp_path / "HumanEvalPlus.jsonl")
    assert (result["benchmark"], result["pass@1"]) == ("humaneval_plus", 0.0)
