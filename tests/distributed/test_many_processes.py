"""`puna train --nproc`: one run under several layouts in turn; a process that fails, and one that is told to stop."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import puna
from puna.checkpoint import load
from puna.checkpoint.runs import checkpoints
from puna.launch import ENVIRONMENT
from puna.train.metrics import read_metrics
from tests.train.conftest import write_random_folder


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of nine steps over packed documents."""
    folder = str(write_random_folder(tmp_path_factory.mktemp("prepared"), seed=0))
    return {
        "model": "tiny-64",
        "data": {"train": folder, "valid": folder},
        "sequence_length": 64,
        "steps": 9,
        "batch_tokens": 512,
        "micro_batch_rows": 2,
        "precision": "fp32",
        "optimizer": {"peak_lr": 1e-3, "eps": 1e-5},  # rounding does not decide where gradients are next to nothing
        "schedule": {"name": "constant", "warmup_steps": 2},
        "validation": {"every": 3, "rows": 7},
        "checkpoint": {"every": 3, "keep": 9},
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def alone(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    puna.train({**content, "run_dir": str(run_dir)})
    return run_dir


def _command(content: dict[str, Any], run_dir: Path, *more: str) -> list[str]:
    recipe = run_dir.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**content, "run_dir": str(run_dir)}))
    return [sys.executable, "-m", "puna", "train", str(recipe), *more]


def _train(content: dict[str, Any], run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(content, run_dir, *more), capture_output=True, text=True, timeout=600, check=False)


def test_a_run_goes_on_under_other_layouts_and_exports_the_same_weights(
    content: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for steps, layout in [(3, ["parallel.tp=2", "parallel.pp=2"]), (6, ["parallel.dp_shard=4"])]:
        done = _train(content, run_dir, "--nproc", "4", f"steps={steps}", *layout)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        assert done.stderr.count("useful tokens") == 1  # one process speaks for all
    done = _train(content, run_dir)
    assert done.returncode == 0, done.stderr
    ours, theirs = read_metrics(run_dir), read_metrics(alone)
    assert [line["step"] for line in ours] == list(range(1, 10))
    for field in ("loss", "grad_norm", "targets", "lr", "tokens", "valid_loss"):
        measured, expected = ([line[field] for line in lines if field in line] for lines in (ours, theirs))
        assert measured == pytest.approx(expected, rel=1e-5)
    for step in checkpoints(run_dir):
        puna.export(run_dir, tmp_path / f"merged-{step}", step=step)
        puna.export(alone, tmp_path / f"whole-{step}", step=step)
        merged, whole = (load(tmp_path / f"{kind}-{step}")[0].state_dict() for kind in ("merged", "whole"))
        for name, weight in whole.items():
            torch.testing.assert_close(merged[name], weight, rtol=0, atol=2e-6)


#: A `puna` whose rank 1 does something else in its third step.
MISBEHAVING = """
import os, sys, time
from datetime import timedelta
import puna.cli, puna.parallel.mesh as mesh, puna.train.run as run
from puna.errors import PunaError
mesh.TIMEOUT = timedelta(seconds=15)
step = run.train_step
def misbehaving(*args, update, **options):
    if os.environ['RANK'] == '1' and update == 3:
        MISDEED
    return step(*args, update=update, **options)
run.train_step = misbehaving
sys.exit(puna.cli.run(sys.argv[1:]))
"""


def _train_with(misdeed: str, content: dict[str, Any], run_dir: Path) -> subprocess.CompletedProcess[str]:
    starter = (
        "import sys, puna.parallel.start as start\n"
        "start.PUNA, start.GRACE_SECONDS = ['-c', sys.argv[1]], 3\n"
        "sys.exit(start.start_processes(sys.argv[2:], 2))\n"
    )
    command = [sys.executable, "-c", starter, MISBEHAVING.replace("MISDEED", misdeed), *_command(content, run_dir)[3:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_error_of_one_rank_reaches_the_terminal_and_the_exit_code(content: dict[str, Any], tmp_path: Path) -> None:
    started = time.monotonic()
    done = _train_with("raise PunaError('the device fell off the bus')", content, tmp_path / "run")
    assert done.returncode == 1
    assert "[rank 1] puna: the device fell off the bus" in done.stderr
    assert time.monotonic() - started < 120  # the others do not wait for it for ever


def test_a_rank_that_hangs_is_an_error_with_the_last_collective_of_each(
    content: dict[str, Any], tmp_path: Path
) -> None:
    done = _train_with("time.sleep(1000)", content, tmp_path / "run")
    assert done.returncode == 1
    assert "puna: the other ranks were waited for in vain; the last collective of each:" in done.stderr
    assert "  rank 0: gloo:" in done.stderr
    assert "  rank 1: gloo:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "said", "code"),
    [("steps=many", "steps='many': input should be", 2), ("data.train=nowhere", "puna: nowhere does not exist", 1)],
)
def test_what_is_wrong_for_all_ranks_is_said_once(
    change: str, said: str, code: int, content: dict[str, Any], tmp_path: Path
) -> None:
    done = _train(content, tmp_path / "run", "--nproc", "2", change)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("puna: ") == 1
    assert said in done.stderr


def test_a_wrong_recipe_is_said_once_under_torchrun_too(content: dict[str, Any], tmp_path: Path) -> None:
    words = _command(content, tmp_path / "run", "steps=many")[1:]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert done.stderr.count("steps='many': input should be") == 1


def test_an_impossible_layout_is_refused_once_with_what_would_do(content: dict[str, Any], tmp_path: Path) -> None:
    done = _train(content, tmp_path / "run", "--nproc", "4", "parallel.tp=4")
    assert done.returncode == 2
    assert done.stderr.count("parallel.tp=4 must divide the 2 key/value heads; use one of [1, 2]") == 1
    assert not (tmp_path / "run").exists()


#: A `puna` whose first rank dies once in a save: before it has begun, or before the first checkpoint has its name.
DYING = """
import os, signal, sys
import puna.cli, puna.checkpoint.runs as runs
if os.environ['RANK'] == '0' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    runs.MOMENT = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(puna.cli.run(sys.argv[1:]))
"""


@pytest.mark.parametrize("moment", ["Checkpoints.save", "_put_in_place"])
def test_a_run_that_dies_before_it_has_saved_begins_again_under_torchrun(
    content: dict[str, Any], alone: Path, tmp_path: Path, moment: str
) -> None:
    run_dir, program = tmp_path / "run", tmp_path / "dying.py"
    program.write_text(DYING.replace("MOMENT", moment))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*torchrun, str(program), *_command(content, run_dir)[3:]]
    environment = {**os.environ, **ENVIRONMENT, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a new run, from random weights") == 2
    losses, expected = ([line["loss"] for line in read_metrics(folder)] for folder in (run_dir, alone))
    assert losses == pytest.approx(expected, rel=1e-5)
    shutil.rmtree(run_dir / "checkpoints")  # from now on they are missed
    done = _train(content, run_dir)
    assert done.returncode == 1
    assert "holds 9 steps of a run but none of its checkpoints; bring them back" in done.stderr


@pytest.mark.parametrize(
    ("number", "is_torchrun"), [(signal.SIGTERM, False), (signal.SIGKILL, False), (signal.SIGKILL, True)]
)
def test_an_end_of_the_starter_saves_the_state_of_all_and_the_run_continues(
    content: dict[str, Any], tmp_path: Path, number: signal.Signals, is_torchrun: bool
) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells processes that their starter was killed")
    run_dir = tmp_path / "run"
    long = {**content, "steps": 4000, "checkpoint": {"every": 4000}, "validation": {"every": 4000, "rows": 1}}
    command = _command(long, run_dir)
    if is_torchrun:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        command += ["--nproc", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}) as process:
        deadline = time.monotonic() + 120
        while len(read_metrics(run_dir)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, number)
        said = process.communicate(timeout=120)[1]  # until the last of them has closed it
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert "run the same command to continue" in said
    assert "Traceback" not in said
    steps = len(read_metrics(run_dir))
    assert list(checkpoints(run_dir)) == [steps]
    done = _train(long, run_dir, f"steps={steps + 1}")
    assert done.returncode == 0, done.stderr
    assert f"from step {steps}" in done.stderr
