"""Where a measurement goes: `results/NAME.json`, with the machine, versions and commit that it was made with."""

import compileall
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import puna
from puna.files import write_json

#: Packages whose version a reader needs to repeat a measurement.
PACKAGES = ("torch", "transformers", "sentencepiece", "tokenizers", "pyarrow", "numpy", "safetensors")


def compile_puna() -> None:
    """Makes puna's bytecode, as pip does of what it installs, so that no process that is timed compiles it first."""
    compileall.compile_dir(Path(puna.__file__).parent, quiet=1)


def record(
    name: str, rows: list[dict[str, Any]], facts: dict[str, Any] | None = None, *, command: str | None = None
) -> Path:
    """Writes and prints a benchmark's result.

    Args:
        name: of the benchmark; its file in `results/` is replaced.
        rows: one measurement each, e.g. one a contender.
        facts: what holds for all rows: settings, goals, ratios.
        command: that repeats it; None: this process's.

    Returns:
        The file.
    """
    result = {"benchmark": name, "command": command or _command(), **_origin(), **(facts or {}), "rows": rows}
    path = Path(__file__).parent / "results" / f"{name}.json"
    write_json(path, result)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return path


def _command() -> str:
    arguments = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def _origin() -> dict[str, Any]:
    found = {package: _version(package) for package in PACKAGES}
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT") or _commit(),
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
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str:
    return _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else "")


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip()
