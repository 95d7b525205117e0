"""Errors that all ranks meet are said by the first alone; a rank's own it says itself."""

import json
import subprocess
import sys
from pathlib import Path

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
