"""The real MindSpore reads what puna writes, and both are timed on the same files.

    python benchmarks/real_mindspore.py [--venv DIR] [--version 2.7.2] [--rows 4000] [--layers 6] [--rounds 3]

Installs MindSpore's wheel (800 MB) into an environment of its own, where there is none yet. Then it is given what puna
wrote: checkpoints in three precisions, which it also saves again; slices of several layouts with their strategy files,
which its own tool merges; MindRecord files, with the index that puna made. The run fails if anything differs. Timed
are all rows of a MindRecord file, and a `.ckpt` made into safetensors, on the disk and where there is none, in memory
(`/dev/shm`): the work alone, its processor time, which other programs disturb less, and the whole process. Beside the
conversions stands how long it takes to copy as many bytes by the system's own call, and to sync them, which nothing
that writes them can be quicker than; MindSpore does not sync.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import arguments, compile_puna, record

from puna.checkpoint import convert, save_model
from puna.checkpoint.formats.mindspore.ckpt import open_ckpt
from puna.data.mindrecord import MindRecord, write_index, write_mindrecord
from puna.model.config import ModelConfig
from puna.model.llama import Llama, init_weights
from puna.testing import tiny_model

LAYOUTS = ("dp=2,mp=2", "mp=2,pp=2", "dp=2,mp=2,pp=2", "dp=2,mp=1,optimizer=1", "dp=2,mp=2,optimizer=1")

IDS = {"input_ids": {"type": "int32", "shape": [-1]}}

#: What is timed: the work alone, processor time of it over all threads, and the whole process.
KINDS = ("seconds", "processor_seconds", "seconds_with_start")

DISK, MEMORY = ".ckpt to safetensors on the disk", ".ckpt to safetensors in memory"

#: How many times faster than MindSpore puna should be.
GOAL = 5


def main() -> None:
    """Checks, measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "mindspore-venv")
    parser.add_argument("--version", default="2.7.2")
    parser.add_argument("--rows", type=int, default=4000, help="of 4,097 ids, in the file that is timed")
    parser.add_argument("--layers", type=int, default=6, help="of the checkpoint that is timed; 2,048 wide")
    parser.add_argument("--rounds", type=int, default=3)
    args = arguments(parser)
    python = installed(args.venv, mindspore=args.version)
    compile_puna()
    with tempfile.TemporaryDirectory() as place:
        checks = checked(python, Path(place))
        rows = [*timed_rows(python, Path(place), args), *timed_conversion(python, Path(place), args, DISK)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        rows += timed_conversion(python, Path(place), args, MEMORY)
    facts: dict[str, Any] = {"mindspore": args.version, "goal_ratio": GOAL, "checks": checks}
    facts["checks_passed"] = f"{sum(checks.values())} of {len(checks)}"
    for work in ("all rows of MindRecord", DISK, MEMORY):
        for kind in KINDS:
            found = {row["contender"]: row[kind] for row in rows if row["work"] == work}
            facts[f"ratio, {work}, {kind}"] = round(found["mindspore"] / found["puna"], 2)
            if found.get("copy"):
                facts[f"ratio that a copy would have, {work}, {kind}"] = round(found["mindspore"] / found["copy"], 2)
    record("real_mindspore", rows, facts)
    if not all(checks.values()):
        sys.exit(f"MindSpore does not read: {', '.join(name for name, passed in checks.items() if not passed)}")


def installed(venv: Path, **versions: str) -> Path:
    """The interpreter of an environment with these packages; what is there already is left as it is."""
    python = venv / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    if missing := [name for name in versions if not list(venv.glob(f"lib/python*/site-packages/{name}"))]:
        wheels = [f"{name}=={versions[name]}" for name in missing]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wheels], check=True)
    return python


def ask(python: Path, task: str, **arguments: Any) -> dict[str, Any]:
    """What MindSpore makes of a task, and how long it took with the start of its process."""
    script = str(Path(__file__).with_name("in_mindspore.py"))
    words = {name: str(value) for name, value in arguments.items()}
    began = time.monotonic()
    result = subprocess.run([str(python), script, task, json.dumps(words)], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if result.returncode:
        sys.exit(f"{task} failed in MindSpore:\n{result.stderr[-3000:]}")
    return {**json.loads(result.stdout.splitlines()[-1]), "seconds_with_start": seconds}


def checked(python: Path, place: Path) -> dict[str, bool]:
    """What MindSpore reads of what puna wrote."""
    save_model(tiny_model(), place / "hf-fp32")
    checks = {}
    for dtype in ("fp32", "fp16", "bf16"):
        folder = convert(place / "hf-fp32", place / f"ms-{dtype}", to="mindspore", dtype=dtype)
        weights = saved_weights(folder / "model.ckpt", place / f"{dtype}.npz")
        found = ask(python, "reads_checkpoint", path=folder / "model.ckpt", weights=weights, again=place / "again.ckpt")
        checks[f".ckpt {dtype}: values"] = found["same_values"]
        checks[f".ckpt {dtype}: saved again with the same bytes"] = found["same_bytes_when_saved_again"]
        (place / "again.ckpt").unlink()
    for layout in LAYOUTS:
        folder = convert(place / "hf-fp32", place / layout, to="mindspore", layout=layout)
        found = ask(python, "merges_slices", folder=folder, weights=place / "fp32.npz")
        checks[f"slices {layout}"] = found["same_values"]
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 32000, (300, 129)).astype(np.int32)
    labels = np.where(generator.random(ids.shape) < 0.5, ids, -100)
    for name, columns in {"wiki": {"input_ids": ids}, "qa": {"input_ids": ids, "labels": labels}}.items():
        path = place / f"{name}.mindrecord"
        schema = {column: IDS["input_ids"] for column in columns}
        rows = [{column: values[i] for column, values in columns.items()} for i in range(len(ids))]
        write_mindrecord(path, name, schema, rows, header_bytes=16 << 10, page_bytes=32 << 10)
        np.savez(place / f"{name}.npz", **columns)
        checks[f"MindRecord {name}"] = ask(python, "reads_rows", path=path, rows=place / f"{name}.npz")["same_values"]
    path.with_name(f"{path.name}.db").unlink()
    write_index(path)
    found = ask(python, "reads_rows", path=path, rows=place / "qa.npz")
    checks["MindRecord with its index made again"] = found["same_values"]
    return checks


def saved_weights(ckpt: Path, path: Path) -> Path:
    """Writes the values of a checkpoint as NumPy's arrays of single precision."""
    np.savez(path, **{name: x.read().float().numpy() for name, x in open_ckpt(ckpt).items() if not isinstance(x, str)})
    return path


def timed_rows(python: Path, place: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both read all rows of a file, in turns."""
    path = place / "large.mindrecord"
    ids = np.random.default_rng(0).integers(0, 32000, (args.rows, 4097)).astype(np.int32)
    write_mindrecord(path, "wiki", IDS, ({"input_ids": row} for row in ids))
    code = (
        "import time, sys; from pathlib import Path; from puna.data.mindrecord import MindRecord;"
        "began, p = time.monotonic(), time.process_time(); rows = MindRecord.open(Path(sys.argv[1])).rows();"
        "print(sum(len(row['input_ids']) for row in rows), time.monotonic() - began, time.process_time() - p)"
    )
    rounds: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for _ in range(args.rounds):
        theirs = ask(python, "reads_all", path=path)
        rounds.append((theirs, with_puna(code, path)))
        if theirs["tokens"] != ids.size or len(MindRecord.open(path)) != args.rows:
            sys.exit("MindSpore and puna do not read the same number of ids")
    return summaries("all rows of MindRecord", rounds, megabytes=ids.nbytes / 1e6)


def timed_conversion(python: Path, place: Path, args: argparse.Namespace, work: str) -> list[dict[str, Any]]:
    """Both make safetensors of a checkpoint in bf16, in turns, and the system copies its bytes."""
    shape = ModelConfig(32000, 2048, 5632, args.layers, 16, 16, rope_theta=1e6, max_position_embeddings=4096)
    model = Llama(shape).to(torch.bfloat16)
    init_weights(model, seed=0)
    save_model(model, place / "large")
    source = convert(place / "large", place / "large-ms", to="mindspore") / "model.ckpt"
    code = (
        "import sys, time; from puna.checkpoint import convert; began, p = time.monotonic(), time.process_time();"
        "convert(sys.argv[1], sys.argv[1] + '.out'); print(0, time.monotonic() - began, time.process_time() - p)"
    )
    rounds, copies = [], []
    for i in range(args.rounds):
        theirs = ask(python, "converts", path=source, output=place / f"theirs-{i}.safetensors")
        target = source.with_name("model.ckpt.out")
        rounds.append((theirs, with_puna(code, source)))
        copies.append(copied(source, place / "copy"))
        for file in [*place.glob("theirs-*"), *target.iterdir()]:
            file.unlink()
        target.rmdir()
    rows = summaries(work, rounds, megabytes=source.stat().st_size / 1e6)
    medians = {kind: round(statistics.median(copy[kind] for copy in copies), 3) for kind in KINDS[:2]}
    absent = {"seconds_with_start": None, "peak_memory_mb": None}
    return [*rows, {**rows[0], "contender": "copy", **medians, **absent}]


def copied(source: Path, target: Path) -> dict[str, float]:
    """How long the system takes to copy a file and to sync it."""
    began, processor_began = time.monotonic(), time.process_time()
    with open(source, "rb") as file, open(target, "wb") as copy:
        place, size = 0, source.stat().st_size
        while place < size:
            place += os.sendfile(copy.fileno(), file.fileno(), place, size - place)
        os.fsync(copy.fileno())
    seconds, processor_seconds = time.monotonic() - began, time.process_time() - processor_began
    target.unlink()
    return {"seconds": seconds, "processor_seconds": processor_seconds}


def with_puna(code: str, path: Path) -> dict[str, Any]:
    """Runs a line of Python in a process of its own, which prints a number and its seconds on clock and processor."""
    began = time.monotonic()
    peak = "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1e3)"
    command = [sys.executable, "-c", f"{code}; {peak}", str(path)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    seconds = time.monotonic() - began
    numbers, memory = result.stdout.splitlines()
    _, work_seconds, processor_seconds = map(float, numbers.split())
    return {
        "seconds": work_seconds,
        "processor_seconds": processor_seconds,
        "seconds_with_start": seconds,
        "peak_memory_mb": round(float(memory)),
    }


def summaries(work: str, rounds: list[tuple[dict[str, Any], dict[str, Any]]], megabytes: float) -> list[dict[str, Any]]:
    """A row of the result for each of the two, medians over the rounds."""
    rows = []
    for contender, taken in zip(("mindspore", "puna"), zip(*rounds, strict=True), strict=True):
        medians = {kind: round(statistics.median(run[kind] for run in taken), 3) for kind in KINDS}
        peak = {"peak_memory_mb": max(run["peak_memory_mb"] for run in taken)}
        rows.append({"work": work, "contender": contender, "megabytes": round(megabytes, 1), **medians, **peak})
    return rows


if __name__ == "__main__":
    main()
