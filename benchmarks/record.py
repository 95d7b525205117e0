"""Where a measurement goes: `results/NAME.json`, with the machine, versions and commit that it was made with.

Only code that is in a commit is measured. With RESULTS=FOLDER any is, and results go there: to try a benchmark.
"""

import argparse
import compileall
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import puna
from puna.devices import cpu_info, cpu_name
from puna.files import write_json

#: Packages whose version a reader needs to repeat a measurement.
PACKAGES = ("torch", "transformers", "sentencepiece", "tokenizers", "pyarrow", "numpy", "safetensors")

#: What a measurement depends on, for git.
CODE = ("puna", "benchmarks", ":!benchmarks/results")


def compile_puna() -> None:
    """Makes puna's bytecode, as pip does of what it installs, so that no process that is timed compiles it first."""
    compileall.compile_dir(Path(puna.__file__).parent, quiet=1)


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What a benchmark is told; where it could not be recorded it ends here, before anything is measured."""
    args = parser.parse_args()
    commit()
    return args


def record(
    name: str, rows: list[dict[str, Any]], facts: dict[str, Any] | None = None, *, command: str | None = None
) -> Path:
    """Prints a benchmark's result and writes it.

    Args:
        name: of the benchmark; its file in `results/` is replaced.
        rows: one measurement each, e.g. one a contender.
        facts: what holds for all rows: settings, goals, ratios.
        command: that repeats it; None: this process's.

    Returns:
        The file.

    Raises:
        SystemExit: as `commit`; it is printed nevertheless.
    """
    measured = {**(facts or {}), "rows": rows}
    print(json.dumps(measured, indent=2, ensure_ascii=False))
    path = Path(os.environ.get("RESULTS") or Path(__file__).parent / "results") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"benchmark": name, "command": command or _command(), **_origin(), **measured})
    return path


def commit() -> str:
    """The commit that is measured; COMMIT names it where git is not there.

    Raises:
        SystemExit: it would not be what is measured.
    """
    if given := os.environ.get("COMMIT"):
        return given
    name, changes = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "--", *CODE)
    if os.environ.get("RESULTS"):
        return name + ("+changes" if changes else "")
    if not name:
        raise SystemExit("git knows no commit here, so nobody could repeat this measurement; name it: COMMIT=…")
    if changes:
        raise SystemExit(
            f"nobody could repeat this measurement, for no commit has these changes:\n{changes}\n"
            "commit them, or only try the benchmark: RESULTS=FOLDER python benchmarks/…"
        )
    return name


def _command() -> str:
    arguments = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def _origin() -> dict[str, Any]:
    found = {package: _version(package) for package in PACKAGES}
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_average": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version for name, version in found.items() if version},
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Its name, and the family and model behind it: clouds hide what tells generations apart."""
    found = {word: cpu_info(field) for word, field in (("family", "cpu family"), ("model", "model"))}
    which = ", ".join(f"{word} {number}" for word, number in found.items() if number)
    return f"{cpu_name()} ({which})" if which else cpu_name()


def _git(*words: str) -> str:
    if shutil.which("git") is None:
        return ""
    root = Path(__file__).parents[1]
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
