"""Two results of one benchmark side by side: what the scores differ by, and which tasks make the difference.

    before/details.jsonl   Tiny/0 passed   Tiny/1 wrong     Tiny/2 passed
    after/details.jsonl    Tiny/0 passed   Tiny/1 passed    Tiny/2 timeout      gained: Tiny/1, lost: Tiny/2

Two results compare where they answer the same questions; what else is different between them is listed.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puna.errors import PunaError
from puna.evaluate.pass_at_k import bootstrap
from puna.evaluate.samples import read_lines
from puna.files import differing, read_json

#: What two results have to have in common for their scores to be answers to the same questions.
SAME = ("benchmark", "variant", "data", "length", "cases", "seed")

#: The same for the texts that were read; results of earlier versions say only where those lay.
CHECKSUMS, PLACE = ("corpus_sha256", "tokens_sha256"), "corpus"

#: What they may differ in, but a reader must know: how the model was asked, and how its answers were judged.
TOLD = ("puna", "server", "answers", "options", "dtype", "cache_dtype", "limits", "sandbox", "window")

#: Of the options, what is no difference: where texts lay whose checksums agree, and a dtype by any other name.
NOT_TOLD = ("options.corpus", "options.dtype")


def compare(first: Path | str, second: Path | str) -> dict[str, Any]:
    """Compares what two runs of `evaluate(…, output=folder)` wrote.

    Args:
        first: the folder of the one, e.g. of the model before training.
        second: that of the other.

    Returns:
        `{"benchmark", "first": scores, "second": scores, "difference": {score: value}, "interval", "gained", "lost",
        "settings"}`: the interval is that of the difference in the share of a task's samples that pass, by bootstrap
        over problems or documents, and holds 95 of 100; gained and lost are the tasks of which more, or fewer, samples
        pass in the second; settings are those that differ, each with both values.

    Raises:
        PunaError: a folder has no result, or the two are not of the same tasks.
    """
    results = [read_result(folder) for folder in (first, second)]
    if why := why_not(*results):
        raise PunaError(f"{first} and {second} do not compare: {why}")
    answers = [list(_answers(Path(folder))) for folder in (first, second)]
    shares, problems = [_shares_passed(each) for each in answers], {task: problem for task, problem, _ in answers[0]}
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
        "interval": bootstrap(list(changes.values()), groups=[problems[task] for task in changes]) if changes else None,
        "tasks": len(changes),
        "gained": [task for task, change in changes.items() if change > 0],
        "lost": [task for task, change in changes.items() if change < 0],
        "settings": _differing(*results),
    }


def why_not(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Why two results do not compare; None: they do."""
    said = [name for name in CHECKSUMS if name in one and name in other]
    differ = next((name for name in (*SAME, *(said or [PLACE])) if one.get(name) != other.get(name)), None)
    return None if differ is None else f"their {differ} is {one.get(differ)} and {other.get(differ)}"


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    known = [name for name in TOLD if name != "options" or all(name in result for result in (one, other))]
    told = ({name: result[name] for name in known if name in result} for result in (one, other))
    return {name: list(values) for name, values in differing(*told).items() if name not in NOT_TOLD}


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


def _shares_passed(answers: list[tuple[str, str, bool]]) -> dict[str, float]:
    """The share of each task's samples that passed; where lines and blocks are asked for, whether each is exact."""
    passed: dict[str, list[bool]] = defaultdict(list)
    for task, _, is_passed in answers:
        passed[task].append(is_passed)
    return {task: sum(found) / len(found) for task, found in passed.items()}


def _answers(folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Task, its problem (of a line or block its document), and whether it passed, of every answer."""
    if (folder / "details.jsonl").exists():
        for _, line in read_lines(folder / "details.jsonl", {"task_id": str, "verdict": str}):
            yield line["task_id"], line.get("problem", line["task_id"]), line["verdict"] == "passed"
    elif (folder / "cases.jsonl").exists():
        for _, line in read_lines(folder / "cases.jsonl", {"kind": str, "document": str, "line": int}):
            document = line["document"]
            yield f"{line['kind']} {document}:{line['line']}", document, bool(line["exact_match"])
