"""Heartbeats: they tell a rank that was stopped, or whose machine is lost, from one that only works for long.

    rank 0: "7"    rank 1: "7"    rank 2: "4" … "4" … "4"
        looks at 1     looks at 2 ─▶ store: rank 2 is silent ─▶ every rank

Each rank posts a number that grows, and looks at that of the next. Ranks that wait for others at a checkpoint may have
to for hours, for disks are slow; a rank that dies is noticed at once, as its connections close; this is for the rest.
"""

import atexit
import contextlib
import threading
from typing import Any

import torch.distributed as dist

from puna.errors import PunaError

#: Seconds between two beats, and how many may be missing before a rank is given up.
PULSE_SECONDS, MOST_MISSING = 10.0, 60

KEY = "puna/pulse"


class Pulse:
    """The heartbeats of all ranks of a run, from now until the process group or the process ends."""

    def __init__(self) -> None:
        self._silent: int | None = None
        self._rank, self._next = dist.get_rank(), (dist.get_rank() + 1) % dist.get_world_size()
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # a connection of its own: the process may be waiting with the other one
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="pulse")
        self._thread.start()
        atexit.register(self._end)

    def check(self) -> None:
        """Raises a PunaError if a rank gives no more signs, as far as this one has heard."""
        if self._silent is not None:
            raise PunaError(
                f"rank {self._silent} has given no sign of life for {PULSE_SECONDS * MOST_MISSING:g} s, while all "
                "worked on a checkpoint: it was stopped, or its machine is lost"
            )

    def _beat(self) -> None:
        """Counts missing beats of the next rank by its own: a rank that was stopped itself does not count any."""
        count = missing = 0
        before = b""
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that keeps it
            while self._silent is None and not self._is_over.wait(PULSE_SECONDS):
                count += 1
                self._store.set(f"{KEY}/{self._rank}", str(count))
                now = self._read(f"{KEY}/{self._next}")
                missing, before = (missing + 1 if now == before else 0), now
                if missing >= MOST_MISSING:
                    self._store.set(KEY, str(self._next))
                if said := self._read(KEY):
                    self._silent = int(said)

    def _read(self, key: str) -> bytes:
        return bytes(self._store.get(key)) if self._store.check([key]) else b""

    def _end(self) -> None:
        self._is_over.set()
        self._thread.join(PULSE_SECONDS)
