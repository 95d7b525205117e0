"""A rank that stops calling: the others' error says what each did last."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
import puna.parallel.mesh as mesh
from puna.errors import PunaError

mesh.TIMEOUT = timedelta(seconds=2)
try:
    with mesh.process_group(torch.device("cpu")):
        dist.all_reduce(torch.zeros(5))
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
