"""Heartbeats of the ranks that work on a checkpoint: they tell who is dead, and for whom the others wait.

    rank 0: "7 5"    rank 1: "7 5"    rank 2: "4 4" … "4 4" … "4 4"     beats, and collectives that it has come to
        reads 1's        reads 2's ─▶ store: rank 2 is silent ─▶ every rank

Ranks that wait for others at a checkpoint may have to for hours, for disks are slow. A rank that dies is noticed at
once, as its connections close; one that was stopped, or whose machine is lost, beats no more. One that beats, but has
come to fewer collectives than the others, is waited for: the first of the others says so, and again after twice the
time. Each rank has one thread and one connection to the store of the process group for all this.
"""

import atexit
import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from puna.errors import PunaError
from puna.progress import say

#: Seconds between two beats, and how many may be missing before a rank is given up.
BEAT_SECONDS, MOST_MISSING = 10.0, 60

#: Seconds of waiting before it is said for whom.
FIRST_SECONDS = 120.0


class Heartbeat:
    """The heartbeats of all ranks of a group, from now until the process group or the process ends.

    Args:
        group: of all ranks.
    """

    def __init__(self, group: Any) -> None:
        size, self._rank = dist.get_world_size(group), dist.get_rank(group)
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # a connection of its own: the process may be waiting with the other one
        key = f"puna/heartbeat/{group.group_name}"
        self._keys, self._silent_key = [f"{key}/{rank}" for rank in range(size)], key
        self._next = (self._rank + 1) % size
        self._silent: int | None = None
        self._collectives, self._since, self._say_after = 0, math.inf, FIRST_SECONDS
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()
        atexit.register(self._end)

    @contextlib.contextmanager
    def in_collective(self) -> Iterator[None]:
        """While open, this rank has done its share, and waits for the others'."""
        self._collectives += 1
        self._since, self._say_after = time.monotonic(), FIRST_SECONDS
        try:
            yield
        finally:
            self._since = math.inf

    def check(self) -> None:
        """Raises a PunaError if a rank gives no more signs, as far as this one has heard; asks nobody."""
        if self._silent is not None:
            raise PunaError(
                f"rank {self._silent} has given no sign of life for {BEAT_SECONDS * MOST_MISSING:g} s, while all "
                "worked on a checkpoint: it was stopped, or its machine is lost"
            )

    def _beat(self) -> None:
        """Counts missing beats of the next rank by its own: a rank that was stopped itself does not count any."""
        beats = missing = 0
        before = b""
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that keeps it
            while self._silent is None:
                beats += 1
                self._store.set(self._keys[self._rank], f"{beats} {self._collectives}")
                now = self._read(self._keys[self._next])
                missing, before = (missing + 1 if now == before else 0), now
                if missing >= MOST_MISSING:
                    self._store.set(self._silent_key, str(self._next))
                if said := self._read(self._silent_key):
                    self._silent = int(said)
                seconds = time.monotonic() - self._since
                if seconds >= self._say_after:
                    self._say_after = 2 * seconds
                    self._say_who_is_late(seconds)
                if self._is_over.wait(BEAT_SECONDS):
                    return

    def _say_who_is_late(self, seconds: float) -> None:
        """Names the ranks that have come to the fewest collectives, if this is the first of the others."""
        if self._store.check(self._keys):
            counts = [int(post.split()[1]) for post in self._store.multi_get(self._keys)]
            late = [rank for rank, count in enumerate(counts) if count == min(counts)]
            if self._rank == next((rank for rank in range(len(counts)) if rank not in late), None):
                who = f"rank {late[0]}" + (f" and {len(late) - 1} more" if late[1:] else "")
                say(f"waiting for {who} at a checkpoint for {seconds:,.0f} s; its disk may be slow, or hang")

    def _read(self, key: str) -> bytes:
        return bytes(self._store.get(key)) if self._store.check([key]) else b""

    def _end(self) -> None:
        self._is_over.set()
        self._thread.join(BEAT_SECONDS)
