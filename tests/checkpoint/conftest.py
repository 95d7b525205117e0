"""What the tests of checkpoints share: a clean process that measures its memory."""

import subprocess
import sys
from collections.abc import Callable

import pytest

#: Imports come first, so that their memory is not counted.
SCRIPT = """
import sys
import torch.distributed.checkpoint
import puna.checkpoint
from puna.testing import PeakAnonymousMemory
torch.zeros(4_000_000)
with PeakAnonymousMemory() as memory:
    {code}
print(memory.grown_bytes)
"""


@pytest.fixture(scope="session")
def peak_anonymous_bytes() -> Callable[..., int]:
    """Runs one statement in a new process; gives the most that its anonymous memory grew."""

    def measure(code: str, *arguments: object) -> int:
        command = [sys.executable, "-c", SCRIPT.format(code=code), *map(str, arguments)]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    return measure
