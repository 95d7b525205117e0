"""A sandbox for all tests of scoring, where the machine has bubblewrap."""

import shutil
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
def open_folder(tmp_path: Path) -> Path:
    """A temporary folder that every user may enter."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    return tmp_path


def judged(sandbox: Sandbox, jobs: Iterable[Job | Script]) -> list[Judgement]:
    """Judgements of jobs, several at once, in their order."""
    return [future.result() for future in [sandbox.submit(job) for job in jobs]]
