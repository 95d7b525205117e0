"""Results as one page: a dict becomes a single HTML file that needs nothing else, neither network nor scripts.

    results = {
        "title": "…", "lead": "…",                             what this is, in a sentence or two
        "facts": [{"value": "1.87", "label": "bits per byte"}],   at a glance
        "curves": [{"title", "x", "y", "lines": [{"name", "points": [[x, y], …]}]}],      see `chart.line_chart`
        "scores": {"columns": ["before", "after"], "notes": ["…"],
                   "rows": [{"name", "unit", "better": "higher" | "lower", "values": [2.9, 1.8]}]},
        "tables": [{"title", "columns": ["", "pass@1"], "rows": [["model", "33.5%"]], "notes": ["…"]}],     all text
        "grid": [{"name": "model", "cells": [{"task", "verdict", "share", "count"}]}],     a square a task
        "failures": [{"title", "verdict", "detail", "code", "printed"}],
        "samples": [{"title", "note", "parts": [["given" | "written", "text"], …]}],
        "stages": [{"title", "command", "seconds", "said"}],
        "run": {"machine": "…", …},                               what ran, and where
        "recipes": {"name": "resolved YAML"},
    }

Only `title` is needed; a part that is missing or empty is left out of the page. Every text is escaped: what a model
wrote is shown, never interpreted. The same dict, as JSON, is what a program reads.
"""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import puna
from puna.errors import UsageError
from puna.files import file_aside, write_json
from puna.report.chart import line_chart

#: The parts of a page, in the order in which it shows them.
PARTS = (
    "title", "lead", "facts", "scores", "tables", "curves", "grid", "failures", "samples", "stages", "run", "recipes"
)  # fmt: skip

#: Packages whose versions decide what comes out.
PACKAGES = ("torch", "numpy", "sentencepiece", "tokenizers", "pyarrow", "safetensors")


def write_report(results: Mapping[str, Any], path: Path | str, *, data: Path | None = None) -> Path:
    """Writes the page.

    Args:
        results: see above.
        path: the HTML file; it takes the place of an older one.
        data: a JSON file for the same results; None: none is written.

    Returns:
        `path`.

    Raises:
        UsageError: `results` has no title, or a part that no page has.
    """
    page = render(results)
    if data is not None:
        write_json(data, results)
    with file_aside(path) as file:
        file.write(page.encode("utf-8", "backslashreplace"))  # a program may hold half of a surrogate pair
    return Path(path)


def render(results: Mapping[str, Any]) -> str:
    """The page's HTML; arguments and errors as for `write_report`."""
    from jinja2 import Environment, PackageLoader

    if unknown := sorted(set(results) - set(PARTS)):
        raise UsageError(f"a report has no part {', '.join(unknown)}; it has {', '.join(PARTS)}")
    if not results.get("title"):
        raise UsageError('a report needs a title: {"title": "…"}')
    page = Environment(
        loader=PackageLoader("puna.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters.update(duration=duration, number=number, verdict=verdict)
    page.globals["line_chart"] = line_chart
    return page.get_template("page.html").render({part: results.get(part) for part in PARTS})


def what_runs_here() -> dict[str, str]:
    """What a reader needs to know about the program and the machine to repeat a result."""
    from puna.devices import cpu_cores, cpu_name, memory_bytes

    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "puna": f"{puna.__version__}{_commit()}",
        "Python": platform.python_version(),
        "packages": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        "machine": f"{cpu_name()}, {cpu_cores()} cores, {memory_bytes() / 2**30:.0f} GiB memory",
        "system": platform.platform(),
    }


def duration(seconds: float) -> str:
    """How long, as people say it: 0.4 s, 12 s, 2 min 5 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def number(value: float | None, unit: str = "") -> str:
    """A score as the table shows it: three figures and its unit; – where there is none."""
    if value is None:
        return "–"
    if unit == "%":
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}{unit and ' ' + unit}"
    return f"{value:#.3g}{unit and ' ' + unit}" if abs(value) < 100 else f"{value:,.0f}{unit and ' ' + unit}"


def verdict(row: Mapping[str, Any]) -> str:
    """How a row's last value compares with the one before: "better", "worse", "equal"; empty where one is missing."""
    before, last = row["values"][-2:]
    if before is None or last is None:
        return ""
    if before == last:
        return "equal"
    return "better" if (last > before) == (row["better"] == "higher") else "worse"


def _commit() -> str:
    """The commit of a checkout, e.g. ", commit 1a2b3c4 and changes"; empty for an installed package."""
    root = Path(puna.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        ask = {"cwd": root, "capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **ask).stdout.strip()  # type: ignore[call-overload]
        changes = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **ask).stdout  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return ""  # no git here: the version says enough
    return f", commit {commit}{' and changes' if changes else ''}"
