"""Two results of one benchmark side by side: what the scores differ by, and which tasks make the difference.

before/details.jsonl   Tiny/0 passed   Tiny/1 wrong     Tiny/2 passed
after/details.jsonl    Tiny/0 passed   Tiny/1 passed    Tiny/2 timeout      gained: Tiny/1, lost: Tiny/2
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from puna.errors import PunaError
from puna.evaluate.pass_at_k import bootstrap
from puna.evaluate.samples import read_lines
from puna.files import read_json


def compare(first: Path | str, second: Path | str) -> dict[str, Any]:
    """Compares what two runs of `evaluate(…, output=folder)` wrote.

    Args:
        first: the folder of the one, e.g. of the model before training.
        second: that of the other.

    Returns:
        `{"benchmark", "first": scores, "second": scores, "difference": {score: value}, "interval", "gained", "lost"}`:
        the interval is that of the difference in the share of a task's samples that pass, by bootstrap over tasks, and
        holds 95 of 100; gained and lost are the tasks of which more, or fewer, samples pass in the second.

    Raises:
        PunaError: a folder has no result, or the two are not of the same tasks.
    """
    results = [read_result(folder) for folder in (first, second)]
    for name in ("benchmark", "variant", "data", "corpus", "cases", "seed"):
        one, other = (result.get(name) for result in results)
        if one != other:
            raise PunaError(f"{first} and {second} do not compare: their {name} is {one} and {other}")
    shares = [shares_passed(folder) for folder in (first, second)]
    if shares[0].keys() != shares[1].keys():
        differ = sorted(shares[0].keys() ^ shares[1].keys())
        raise PunaError(f"{first} and {second} do not compare: only one of them has the task {differ[0]}")
    scores = [{name: value for name, value in result.items() if isinstance(value, float)} for result in results]
    changes = {task: shares[1][task] - share for task, share in shares[0].items()}
    return {
        "benchmark": results[0]["benchmark"],
        "first": {"folder": str(first), **scores[0]},
        "second": {"folder": str(second), **scores[1]},
        "difference": {name: scores[1][name] - value for name, value in scores[0].items() if name in scores[1]},
        "interval": bootstrap(list(changes.values())) if changes else None,
        "tasks": len(changes),
        "gained": [task for task, change in changes.items() if change > 0],
        "lost": [task for task, change in changes.items() if change < 0],
    }


def read_result(folder: Path | str) -> dict[str, Any]:
    """What `evaluate` wrote into a folder.

    Raises:
        PunaError: it holds no result.
    """
    path = Path(folder) / "result.json"
    if not path.exists():
        raise PunaError(f"{folder} holds no result; a run of puna evaluate … -o DIR writes one when it has ended")
    result: dict[str, Any] = read_json(path)
    return result


def shares_passed(folder: Path | str) -> dict[str, float]:
    """The share of each task's samples that passed; where lines and blocks are asked for, whether each is exact."""
    folder = Path(folder)
    passed: dict[str, list[bool]] = defaultdict(list)
    if (folder / "details.jsonl").exists():
        for _, line in read_lines(folder / "details.jsonl", {"task_id": str, "verdict": str}):
            passed[line["task_id"]].append(line["verdict"] == "passed")
    elif (folder / "cases.jsonl").exists():
        for _, line in read_lines(folder / "cases.jsonl", {"kind": str, "document": str, "line": int}):
            passed[f"{line['kind']} {line['document']}:{line['line']}"].append(bool(line["exact_match"]))
    return {task: sum(found) / len(found) for task, found in passed.items()}
