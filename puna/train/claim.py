"""A run's claim to its folder: no second process trains there, and the folder's removal is noticed.

The first rank holds the lock of `run_dir/.lock`. Where that file is no longer what lies in the folder, someone removed
it while training went on, by mistake or because a disk is swept: what the run has in memory is then all there is of it.
So the folder is made again and training goes on, unless another run has begun there.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from puna.checkpoint.runs import checkpoints
from puna.errors import PunaError
from puna.files import try_lock
from puna.parallel.collectives import of_first_rank
from puna.parallel.mesh import is_first_rank
from puna.progress import say

#: How long, under torchrun, another process may keep the folder, and the time between two looks: a file server holds
#: the lock of a machine that was lost for some 90 seconds more.
PATIENCE_SECONDS, LOOK_SECONDS = 150, 1.0


@contextlib.contextmanager
def only_run_in(run_dir: Path) -> Iterator["Claim"]:
    """Keeps a second process from training in the same folder; all ranks call it.

    Raises:
        PunaError: another one does.
    """
    claim = Claim(run_dir)
    try:
        claim.take()
        yield claim
    finally:
        claim.let_go()


class Claim:
    """What keeps others out of a run's folder; every rank has one, and calls the same methods."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._path = run_dir, run_dir / ".lock"
        self._held: IO[str] | None = None
        self._is_made = False  # the folder, by this claim

    def take(self) -> None:
        """Makes the folder and locks it, or raises a PunaError where another run has it."""
        if not of_first_rank(is_first_rank() and self._is_taken()):
            raise PunaError(f"another process is training in {self._run_dir}; choose another run_dir")

    def renew(self) -> bool:
        """Before a save: takes the folder again where it was removed, and says so; whether it was."""
        is_lost = of_first_rank(is_first_rank() and self._is_lost())
        if is_lost:
            self.take()
            left = len(checkpoints(self._run_dir))
            say(
                f"someone removed files of {self._run_dir} while it was trained in; checkpoints that are left: {left}. "
                f"Training goes on, and saves there"
            )
        return is_lost

    def let_go(self) -> None:
        """Leaves the folder to others, and none behind where it was made for a run that was refused."""
        if self._held is None:
            return
        with contextlib.suppress(OSError):  # as where others have removed it
            if self._is_made and os.listdir(self._run_dir) == [self._path.name]:
                self._path.unlink()
                self._run_dir.rmdir()
        self._held.close()
        self._held = None

    def _is_taken(self) -> bool:
        self.let_go()
        is_new = not self._run_dir.exists()
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._held = open(self._path, "a")  # noqa: SIM115 - closed in let_go
        is_ours = self._lock_in_time(self._held)
        if is_ours is not False and self._is_lost():  # a run that was refused took the folder away meanwhile
            return self._is_taken()
        self._is_made = is_new and is_ours is not False
        if is_ours is None:
            say(f"the file system of {self._run_dir} has no locks: see to it that no second process trains there")
        return is_ours is not False

    def _lock_in_time(self, file: IO[str]) -> bool | None:
        """As `try_lock`; under torchrun, which starts processes again, those before have time to let go."""
        is_ours = try_lock(file)
        if is_ours is False and "TORCHELASTIC_RUN_ID" in os.environ:
            say(f"waiting up to {PATIENCE_SECONDS} seconds for another process to leave {self._run_dir}")
            deadline = time.monotonic() + PATIENCE_SECONDS
            while is_ours is False and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)
                is_ours = try_lock(file)
        return is_ours

    def _is_lost(self) -> bool:
        try:
            return self._held is None or not os.path.samestat(os.stat(self._path), os.fstat(self._held.fileno()))
        except OSError:  # nothing is there, or a server has forgotten what was
            return True
