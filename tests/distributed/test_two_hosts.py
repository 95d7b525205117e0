"""A run over two hosts survives the loss of a process or of a host, and learns what one process would have."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from puna.data.prepare import prepare
from puna.launch import launch
from puna.train import train
from tests.distributed.hosts import INTERFACE, Host, NoHosts, two_hosts

STEPS, SAVE_EVERY = 20, 4

#: After so many steps something is killed: the last checkpoint lies behind, the end far ahead.
KILL_AT = 6


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as pair:
            yield pair
    except NoHosts as reason:
        pytest.skip(str(reason))


@pytest.fixture
def recipe(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Steps of 2,048 tokens, so that there is time to see them pass."""
    library = [Path(os.__file__).with_name(name) for name in ("ast.py", "random.py", "shelve.py")]
    prepare("code", library, tmp_path / "data", tokenizer=tiny_model_folder, workers=1)
    return {
        "model": "tiny-64",
        "data": {"train": str(tmp_path / "data")},
        "sequence_length": 64,
        "run_dir": str(tmp_path / "run"),
        "steps": STEPS,
        "batch_tokens": 2048,
        "micro_batch_rows": 4,
        "precision": "fp32",
        "optimizer": {"peak_lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": SAVE_EVERY},
        "device": "cpu",
    }


def environment(**changes: str) -> dict[str, str]:
    """The environment here, in which torchrun is found and takes one thread."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": programs, "OMP_NUM_THREADS": "1", **changes}


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss, as far as the run has come."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    return {numbers["step"]: numbers["loss"] for numbers in map(json.loads, lines)}


def training_process(host: Host) -> int:
    """The process that trains on a host: torchrun's child."""
    (pid,) = [pid for pid, words in host.processes().items() if "puna" in words and "--nnodes=2" not in words]
    return pid


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["process", "host"])
def test_what_is_lost_in_mid_run_is_replaced_and_the_losses_are_those_of_one_process(
    hosts: tuple[Host, Host], recipe: dict[str, Any], tmp_path: Path, lost: str
) -> None:
    path, run_dir = tmp_path / "recipe.yaml", Path(recipe["run_dir"])
    path.write_text(yaml.safe_dump(recipe))
    text = launch(str(path), nodes=2, gpus=1, master_addr=hosts[0].address)
    lines = [line for line in text.splitlines() if not line.startswith("#")]

    def start(number: int, log: str) -> subprocess.Popen[bytes]:
        own = environment(PET_LOCAL_ADDR=hosts[number].address, GLOO_SOCKET_IFNAME=INTERFACE)
        return hosts[number].start(lines[number], folder=tmp_path, environment=own, log=tmp_path / f"{log}.log")

    def said() -> str:
        return "\n".join(f"{log.stem}: {log.read_text(errors='replace')[-4000:]}" for log in tmp_path.glob("*.log"))

    first, second = start(0, "first"), start(1, "second")
    deadline = time.monotonic() + 300
    while len(losses(run_dir)) < KILL_AT:
        assert time.monotonic() < deadline, f"no {KILL_AT} steps in 300 seconds:\n{said()}"
        assert (first.poll(), second.poll()) == (None, None), said()
        time.sleep(0.02)
    if lost == "process":
        os.kill(training_process(hosts[1]), signal.SIGKILL)
    else:
        hosts[1].clear()
        second = start(1, "second-again")
    assert len(losses(run_dir)) < STEPS - SAVE_EVERY, "it was killed too late to be missed"

    assert [node.wait(timeout=300) for node in (first, second)] == [0, 0], said()
    assert f"continuing {run_dir} from step" in said()
    alone = tmp_path / "alone"
    train(path, [f"run_dir={alone}"])
    undisturbed = losses(alone)
    assert list(undisturbed) == list(range(1, STEPS + 1))
    assert losses(run_dir) == pytest.approx(undisturbed, rel=5e-5)
    assert undisturbed[STEPS] < undisturbed[1] - 0.5
