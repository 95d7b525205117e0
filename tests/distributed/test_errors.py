"""Errors that all ranks meet are said by the first of each machine; a rank's own is said by it, and elsewhere."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.distributed as dist

from puna import cli
from puna.errors import PunaError, Stopped, UsageError
from puna.parallel import errors, hangs, mesh

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
import puna.parallel.errors as errors
import puna.parallel.mesh as mesh
from puna.errors import PunaError

errors.ANSWER_SECONDS, errors.LEAVE_SECONDS = 1.0, 0.0
found = []
with mesh.process_group(torch.device("cpu")):
    for number, messages in enumerate(json.loads(sys.argv[1])):
        errors.KEY = f"case/{number}"
        message, is_said = messages[dist.get_rank()], None
        try:
            with errors.said_once():
                if message:
                    raise PunaError(message)
        except PunaError as error:
            is_said = error.is_said
        found.append([None] * 3)
        dist.all_gather_object(found[-1], is_said)
if os.environ["RANK"] == "0":
    open(sys.argv[2], "w").write(json.dumps(found))
"""


def test_a_rank_leaves_to_the_first_what_both_of_them_meet(tmp_path: Path) -> None:
    cases = {
        ("no data", "no data", "no data"): [False, True, True],
        (None, "a full disk", None): [None, False, None],
        ("no data", "a full disk", "no data"): [False, False, True],
    }
    script, found = tmp_path / "errors.py", tmp_path / "found.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", script]
    done = subprocess.run(
        [*command, json.dumps(list(cases)), found], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(found.read_text()) == list(cases.values())


TWICE = """
import sys
import torch, torch.distributed as dist
from puna.parallel.mesh import process_group

for _ in range(2):
    with process_group(torch.device("cpu")):
        total = torch.ones(())
        dist.all_reduce(total)
        store = dist.distributed_c10d._get_default_store()
        sys.stdout.write(f"{int(total)} {store.check(['left'])}\\n")
        sys.stdout.flush()
        dist.barrier()
        store.set("left", "")
"""


def test_processes_of_torchrun_are_joined_again_by_nothing_of_before(tmp_path: Path) -> None:
    (script := tmp_path / "twice.py").write_text(TWICE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["2 False"] * 4


@pytest.mark.parametrize("culprit", [0, 2, 3])
def test_what_ends_a_rank_is_said_on_every_machine(in_ranks: Callable[..., list[Any]], culprit: int) -> None:
    said = in_ranks(4, fail_on_two_machines, [culprit])
    lost = "another rank ended while this one waited for it; what it said says why"
    told = [f"puna: on another machine, rank {culprit}: a full disk", lost]
    here, there = (0, 2) if culprit < 2 else (2, 0)
    assert said[culprit] == ["a full disk"]
    assert said[here + 1 - culprit % 2] == [lost]
    assert said[there : there + 2] == [told, []]


def test_what_all_ranks_meet_is_said_by_the_first_of_each_machine(in_ranks: Callable[..., list[Any]]) -> None:
    assert in_ranks(4, fail_on_two_machines, [0, 1, 2, 3]) == [["a full disk"], [], ["a full disk"], []]


@pytest.mark.parametrize(
    ("ranks", "waits"),
    [
        ({}, False),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"RANK": "2", "LOCAL_RANK": "1"}, True),
        ({"RANK": "2"}, True),
    ],
)
def test_a_wrong_request_is_left_to_the_first_rank_of_a_machine(
    ranks: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    waited: list[float] = []
    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=waited.append))
    assert cli._explained(UsageError("steps=0")) == UsageError.exit_code
    assert bool(waited) == waits


def fail_on_two_machines(culprits: list[int]) -> list[str]:
    """What a rank says, of two on each machine, when some of them meet an error."""
    rank, said = dist.get_rank(), []
    with (
        patch.dict(os.environ, LOCAL_RANK=str(rank % 2)),
        patch.multiple(errors, ANSWER_SECONDS=3.0, LEAVE_SECONDS=0.0, complain=said.append),
        patch.object(hangs, "LOOK_SECONDS", 0.1),
    ):
        try:
            with errors.said_once(), hangs.explained_hangs():
                if rank in culprits:
                    raise PunaError("a full disk")
                dist.barrier()
        except PunaError as error:
            said += [] if error.is_said else [str(error)]
    return said


@pytest.mark.parametrize(
    ("device", "error", "is_closed"),
    [
        ("cuda", None, True),
        ("cuda", Stopped("stopped at step 3", 15), True),  # all ranks at once
        ("cuda", PunaError("out of memory"), False),
        ("cuda", KeyboardInterrupt(), False),
        ("cpu", PunaError("out of memory"), True),
    ],
)
def test_nccl_is_not_waited_for_behind_an_error(
    monkeypatch: pytest.MonkeyPatch, device: str, error: BaseException | None, is_closed: bool
) -> None:
    calls = MagicMock()
    calls.rendezvous.return_value = iter([(dist.HashStore(), 0, 1)])
    calls.get_default_backend_for_device.return_value = "nccl"
    for name in ("rendezvous", "get_default_backend_for_device", "init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, getattr(calls, name))
    for name in ("said_once", "explained_hangs"):
        monkeypatch.setattr(mesh, name, contextlib.nullcontext)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with contextlib.suppress(PunaError, KeyboardInterrupt), mesh.process_group(torch.device(device)):
        if error is not None:
            raise error
    assert calls.init_process_group.called
    assert calls.destroy_process_group.called == is_closed
