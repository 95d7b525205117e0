"""Two results of one benchmark side by side: what the scores differ by, and which tasks make the difference.

    before/details.jsonl   Tiny/0 passed   Tiny/1 wrong     Tiny/2 passed
    after/details.jsonl    Tiny/0 passed   Tiny/1 passed    Tiny/2 timeout      gained: Tiny/1, lost: Tiny/2

Two results compare where they answer the same questions; what else is different between them is listed.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import PunaError
from puna.evaluate.pass_at_k import bootstrap, by_task
from puna.evaluate.samples import read_lines
from puna.files import differing, read_json

#: What two results have to have in common for their scores to be answers to the same questions.
SAME = ("benchmark", "variant", "data", "length", "cases", "seed")

#: The same for the texts that were read; results of earlier versions say only where those lay.
CHECKSUMS, PLACE = ("corpus_sha256", "tokens_sha256"), "corpus"

#: What they may differ in, but a reader must know: how the model was asked, and how its answers were judged.
TOLD = ("puna", "server", "answers", "dtype", "limits", "sandbox", "window")

#: Of the options, what is no difference: where texts lay whose checksums agree, and a dtype by any other name.
NOT_TOLD = ("options.corpus", "options.dtype")

#: Scores that are the share of a task's samples that are right, or whether a line or block is.
RIGHT = ("pass@1", "exact_match", "block_exact_match")


def compare(first: Path | str, second: Path | str) -> dict[str, Any]:
    """Compares what two runs of `evaluate(…, output=folder)` wrote.

    Args:
        first: the folder of the one, e.g. of the model before training.
        second: that of the other.

    Returns:
        `{"benchmark", "first": scores, "second": scores, "difference": {score: value}, "intervals": {score: [low,
        high]}, "tasks", "gained", "lost", "settings"}`: intervals are those of the differences, each task, line or
        document compared with itself, by bootstrap over problems or documents, and hold 95 of 100, or None where those
        are too few; gained and lost are the tasks of which more, or fewer, samples pass in the second; settings are
        those that differ, with both values.

    Raises:
        PunaError: a folder has no result, or the two are not of the same tasks.
    """
    results = [read_result(folder) for folder in (first, second)]
    if why := why_not(*results):
        raise PunaError(f"{first} and {second} do not compare: {why}")
    parts = [_parts(Path(folder)) for folder in (first, second)]
    right = [{of: part.value for name in RIGHT for of, part in each.get(name, {}).items()} for each in parts]
    if differ := sorted(right[0].keys() ^ right[1].keys()):
        raise PunaError(f"{first} and {second} do not compare: only one of them has the task {differ[0]}")
    scores = [{name: value for name, value in result.items() if isinstance(value, float)} for result in results]
    changes = {task: right[1][task] - share for task, share in right[0].items()}
    return {
        "benchmark": results[0]["benchmark"],
        "first": {"folder": str(first), **scores[0]},
        "second": {"folder": str(second), **scores[1]},
        "difference": {name: scores[1][name] - value for name, value in scores[0].items() if name in scores[1]},
        "intervals": {name: _interval(one, parts[1][name]) for name, one in parts[0].items() if name in parts[1]},
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
    told = differing(_told(one, beside=other), _told(other, beside=one))
    return {name: list(values) for name, values in told.items() if name not in NOT_TOLD}


def _told(result: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says of its settings, as far as the one beside it says such: earlier versions said less."""
    told = {name: result[name] for name in TOLD if name in result and (name != "dtype" or name in beside)}
    options = _options(beside)
    return told | {f"options.{name}": value for name, value in _options(result).items() if name in options}


def _options(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return result.get("options", {"cache_dtype": result.get("cache_dtype")})


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


@dataclass(frozen=True)
class Part:
    """What a score is the mean of: its value for one task, line, block or document.

    Attributes:
        value: of the score.
        group: what is drawn together for intervals: a task's problem, a line's document.
        weight: in the mean.
    """

    value: float
    group: str
    weight: float = 1.0


def _interval(one: Mapping[str, Part], other: Mapping[str, Part]) -> list[float] | None:
    """That of the difference, each task with itself: this says more than two intervals that overlap."""
    both = [(part, other[of]) for of, part in one.items() if of in other]
    return bootstrap(
        [second.value - first.value for first, second in both],
        weights=[part.weight for part, _ in both],
        groups=[part.group for part, _ in both],
    )


def _parts(folder: Path) -> dict[str, dict[str, Part]]:
    """Score -> task, line, block or document -> its part in it; as far as the folder holds such."""
    parts: dict[str, dict[str, Part]] = defaultdict(dict)
    passed, problems = defaultdict(list), {}
    for line in _lines(folder / "details.jsonl", {"task_id": str, "verdict": str}):
        passed[line["task_id"]].append(line["verdict"] == "passed")
        problems[line["task_id"]] = line.get("problem", line["task_id"])
    for name, values in by_task((len(found), sum(found)) for found in passed.values()).items():
        parts[name] = {task: Part(value, problems[task]) for task, value in zip(passed, values, strict=True)}
    for line in _lines(folder / "cases.jsonl", {"kind": str, "document": str, "line": int}):
        prefix = "block_" if line["kind"] == "block" else ""
        for name in ("exact_match", "edit_similarity"):
            of = f"{line['kind']} {line['document']}:{line['line']}"
            parts[prefix + name][of] = Part(float(line[name]), line["document"])
    for line in _lines(folder / "documents.jsonl", {"document": str, "nats": float, "bytes": int}):
        bits = line["nats"] / math.log(2) / line["bytes"]
        parts["bits_per_byte"][line["document"]] = Part(bits, line["document"], line["bytes"])
    return parts


def _lines(path: Path, fields: Mapping[str, type]) -> Iterator[dict[str, Any]]:
    return (line for _, line in read_lines(path, fields)) if path.exists() else iter(())
