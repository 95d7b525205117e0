"""From what `puna evaluate -o` writes to a page: scores beside the paper's, every task, what failed and why."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import puna
from puna.evaluate.comparing import read_result
from puna.evaluate.paper import paper_name
from puna.evaluate.samples import read_lines
from puna.evaluate.sandbox import VERDICTS
from puna.report import what_runs_here, write_report

#: Scores that are no shares; all others are shown in percent.
NOT_SHARES = ("bits_per_byte", "perplexity")

#: Fields of a result that the page shows elsewhere, or not at all.
SHOWN_ELSEWHERE = ("intervals", "paper", "verdicts", "by_position", "cells", "benchmark", "model", "sandbox", "puna")


def write_evaluation(folders: Sequence[Path | str], path: Path | str) -> Path:
    """Writes the page of one benchmark's results, one folder a model.

    Args:
        folders: each with what `evaluate(…, output=folder)` wrote.
        path: the HTML file.

    Raises:
        PunaError: a folder holds no result.
    """
    return write_report(evaluation_results(folders), path)


def evaluation_results(folders: Sequence[Path | str]) -> dict[str, Any]:
    """What the page shows, see `puna.report`."""
    results = _named(folders)
    details = {name: _details(Path(folder)) for name, folder in zip(results, folders, strict=True)}
    first = next(iter(results.values()))
    benchmark = first["benchmark"] + (f" ({first['variant']})" if first.get("variant") else "")
    return {
        "title": f"{benchmark}: {', '.join(results)}",
        "lead": _lead(first),
        "tables": [table for table in (_scores(results), _verdicts(results), _cells(results)) if table["rows"]],
        "curves": _curves(results),
        "grid": _grid(details),
        "failures": _failures(details),
        "run": {**what_runs_here(), **_settings(first)},
    }


def _named(folders: Sequence[Path | str]) -> dict[str, dict[str, Any]]:
    """The results by the names of what was scored; where those are one name, with their folders."""
    read = [(folder, read_result(folder)) for folder in folders]
    names = Counter(_name(folder, result) for folder, result in read)
    return {
        name if names[name] == 1 else f"{name} ({folder})": result
        for folder, result in read
        for name in [_name(folder, result)]
    }


def _name(folder: Path | str, result: Mapping[str, Any]) -> str:
    return str(result.get("model") or result.get("answers", {}).get("file") or Path(folder).name)


def _lead(result: Mapping[str, Any]) -> str:
    answers = result.get("answers", {})
    how = f"{answers['samples']} answers a task, {answers['protocol']}" if "protocol" in answers else ""
    count = f"{result['tasks']} tasks" if "tasks" in result else ""
    intervals = "In brackets: between which values 95 of 100 such sets of tasks would lie."
    return ". ".join(part for part in (", ".join(filter(None, (count, how))), intervals) if part)


def _scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    scores = dict.fromkeys(name for result in results.values() for name, value in result.items() if _is_score(value))
    rows = [[model, *(_cell(result, name) for name in scores)] for model, result in results.items()]
    paper = next(iter(results.values())).get("paper", {})
    own = [paper_name(model) for model in results]
    asked = [model for model in paper if model in own] or list(paper)
    rows += [[f"paper: {model}", *(_shown(name, paper[model].get(name)) for name in scores)] for model in asked]
    return {"title": "Scores", "columns": ["", *scores], "rows": rows}


def _is_score(value: Any) -> bool:
    return isinstance(value, float)


def _cell(result: Mapping[str, Any], name: str) -> str:
    interval = result.get("intervals", {}).get(name)
    text = _shown(name, result.get(name))
    return f"{text} ({_shown(name, interval[0])} to {_shown(name, interval[1])})" if interval else text


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if name in NOT_SHARES else f"{value:.1%}"


def _verdicts(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = [
        [model, *(f"{result['verdicts'][verdict]:,}" for verdict in VERDICTS)]
        for model, result in results.items()
        if "verdicts" in result
    ]
    notes = [f"{verdict}: {meaning}" for verdict, meaning in VERDICTS.items()]
    return {"title": "Verdicts on the answers", "columns": ["", *VERDICTS], "rows": rows, "notes": notes}


def _cells(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    cells = dict.fromkeys(name for result in results.values() for name in result.get("cells", {}))
    rows = [
        [model, *(_shown(name, result["cells"].get(name)) for name in cells)]
        for model, result in results.items()
        if "cells" in result
    ]
    return {"title": "Found, by length and place", "columns": ["", *cells], "rows": rows}


def _curves(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    lines = [
        {"name": model, "style": "dots", "points": [[s["to"], s["perplexity"]] for s in result["by_position"]]}
        for model, result in results.items()
        if "by_position" in result
    ]
    return [{"title": "Perplexity by position", "x": "token", "y": "perplexity", "lines": lines}] if lines else []


def _details(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every task's judged samples."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if (folder / "details.jsonl").exists():
        for _, line in read_lines(folder / "details.jsonl", {"task_id": str, "verdict": str}):
            found[line["task_id"]].append(line)
    return found


def _grid(details: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A row of squares a model: a task whose samples pass, the fainter the fewer do; else what befell most of them."""
    return [
        {
            "name": model,
            "cells": [
                {"task": task, "verdict": _verdict(samples), "share": _share(samples), "count": len(samples)}
                for task, samples in tasks.items()
            ],
        }
        for model, tasks in details.items()
        if tasks
    ]


def _verdict(samples: list[dict[str, Any]]) -> str:
    if _share(samples) > 0:
        return "passed"
    (verdict, _), *_ = Counter(sample["verdict"] for sample in samples).most_common(1)
    return str(verdict)


def _share(samples: list[dict[str, Any]]) -> float:
    return sum(sample["verdict"] == "passed" for sample in samples) / len(samples)


def _failures(details: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> list[dict[str, str]]:
    """The first sample of each kind of failure of every task."""
    failures = []
    for model, tasks in details.items():
        for task, samples in tasks.items():
            kinds: dict[str, dict[str, Any]] = {}
            for sample in samples:
                if sample["verdict"] != "passed":
                    kinds.setdefault(sample["verdict"], sample)
            failures += [
                {
                    "title": task if len(details) == 1 else f"{model}: {task}",
                    "verdict": verdict,
                    "detail": sample.get("detail", ""),
                    "code": sample.get("solution", sample.get("completion", "")),
                    "printed": sample.get("printed", ""),
                }
                for verdict, sample in kinds.items()
            ]
    return failures


def _settings(result: Mapping[str, Any]) -> dict[str, str]:
    """Everything else that the result says of how it came about."""
    settings = {"sandbox": result["sandbox"]} if "sandbox" in result else {}
    if result.get("puna", puna.__version__) != puna.__version__:
        settings["puna, of the answers"] = result["puna"]
    for name, value in result.items():
        if name not in SHOWN_ELSEWHERE and not _is_score(value):
            known = value.items() if isinstance(value, dict) else ()
            settings[name] = ", ".join(f"{k} {v}" for k, v in known if v is not None) or str(value)
    return settings
