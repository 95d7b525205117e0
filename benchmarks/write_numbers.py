"""Writes docs/numbers.md from benchmarks/results/*.json: `python benchmarks/write_numbers.py`."""

import json
from pathlib import Path
from typing import Any

from puna.files import file_aside

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "numbers.md"

#: Long lists and texts stay in the JSON files.
LONGEST_CELL = 60


def page() -> str:
    """The page's text."""
    parts = ["# Numbers\n\nMade by `python benchmarks/write_numbers.py` from `benchmarks/results/`; do not edit.\n"]
    parts += [_section(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*.json"))]
    return "\n".join(parts)


def _section(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    facts = {
        name: value
        for name, value in result.items()
        if name not in {"benchmark", "command", "when", "commit", "machine", "versions", "rows"}
    }
    lines = [
        f"## {result['benchmark']}",
        "",
        f"`{result['command']}` at {result['commit']}, {result['when'][:10]}; {machine['processor']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB; {versions}.",
        "",
    ]
    lines += [f"- {name}: {_cell(value)}" for name, value in facts.items() if _cell(value)]
    names = dict.fromkeys(name for row in result["rows"] for name in row)
    columns = [name for name in names if any(_cell(row.get(name)) for row in result["rows"])]
    lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in result["rows"]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict | list):
        return ""
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST_CELL else ""


if __name__ == "__main__":
    with file_aside(PAGE, "w") as file:
        file.write(page())
