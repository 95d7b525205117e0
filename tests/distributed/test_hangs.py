"""A rank that stops calling: the others' error says what each did last, or that it gives no sign of life."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from puna.errors import PunaError
from puna.parallel.mesh import process_group

try:
    with process_group(torch.device("cpu")):
        dist.all_reduce(torch.zeros(5))
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))  # from now on: they may be slow to find each other
        if dist.get_rank() == 1:
            time.sleep(6)
        else:
            dist.all_gather_into_tensor(torch.zeros(6), torch.zeros(3))
except PunaError as error:
    open(sys.argv[1], "w").write(str(error))
"""


def test_the_error_says_the_last_collective_of_the_rank_that_waits_and_of_the_one_that_stopped(tmp_path: Path) -> None:
    script, said = tmp_path / "hang.py", tmp_path / "said"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, said]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    first, *ranks = said.read_text().splitlines()
    assert "in vain" in first
    assert [line.split(",")[0] for line in ranks] == ["  rank 0: gloo:all_gather", "  rank 1: gloo:all_reduce"]
    assert "shape [3]" in ranks[0]
    assert "shape [5]" in ranks[1]


SAVING = """
import os, signal, sys, time
import torch, torch.distributed as dist
from puna.checkpoint import heartbeat
from puna.checkpoint.runs import Checkpoints
from puna.errors import PunaError
from puna.parallel.mesh import process_group

heartbeat.BEAT_SECONDS, heartbeat.MOST_MISSING, heartbeat.FIRST_SECONDS = 0.1, 20, 1.0

class Hindered(Checkpoints):
    def _stage(self, state, **options):
        if dist.get_rank() == 1:
            if sys.argv[3] == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(4)
        return super()._stage(state, **options)

with process_group(torch.device("cpu")):
    checkpoints = Hindered(sys.argv[1])
    try:
        checkpoints.save(1, {"model": {"x": torch.ones(3)}}, {})
        checkpoints.wait()
        said = "kept"
    except PunaError as error:
        said = str(error)
open(f"{sys.argv[2]}-{os.environ['RANK']}", "w").write(said)
"""


@pytest.mark.parametrize("hindered", ["slow", "stopped"])
def test_a_rank_that_is_stopped_at_a_checkpoint_is_given_up_and_one_that_is_slow_is_not(
    tmp_path: Path, hindered: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SAVING, tmp_path / "run", tmp_path / "said", hindered]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environments = [{**os.environ, **rendezvous, "RANK": str(rank)} for rank in range(2)]
    ranks = [subprocess.Popen(command, env=each, stderr=subprocess.PIPE, text=True) for each in environments]
    try:
        _, err = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 0, err
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert re.search("waiting for rank 1 at a checkpoint for [12] s; its disk may be slow, or hang", err), err
    said = (tmp_path / "said-0").read_text()
    assert said == "kept" if hindered == "slow" else said.startswith("rank 1 has given no sign of life for 2 s"), said
