"""A sandbox for all tests of scoring, where the machine has bubblewrap."""

import shutil
from collections.abc import Iterator

import pytest

from puna.evaluate.sandbox import Limits, Sandbox, install_command


@pytest.fixture(scope="session")
def bubblewrap() -> str:
    path = shutil.which("bwrap")
    if path is None:
        pytest.skip(f"no bubblewrap here; install it: {install_command()}")
    return path


@pytest.fixture(scope="session")
def sandbox(bubblewrap: str) -> Iterator[Sandbox]:
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=4), workers=2) as sandbox:
        yield sandbox
