"""A sandbox for all tests of scoring, where the machine has bubblewrap."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from puna.evaluate.sandbox import Job, Judgement, Limits, Sandbox, Script
from puna.evaluate.walls import install_command


@pytest.fixture(scope="session")
def bubblewrap() -> str:
    path = shutil.which("bwrap")
    if path is None:
        pytest.skip(f"no bubblewrap here; install it: {install_command()}")
    return path


@pytest.fixture(scope="session")
def sandbox(bubblewrap: str) -> Iterator[Sandbox]:
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=15), workers=2) as sandbox:
        yield sandbox


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter, as pytest's own may not be."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def judged(sandbox: Sandbox, jobs: Iterable[Job | Script]) -> list[Judgement]:
    """Judgements of jobs, several at once, in their order."""
    return [future.result() for future in [sandbox.submit(job) for job in jobs]]
