"""Who is waited for at a meeting: while the others wait, one of them says it, and again after twice the time.

    rank 0: 5 ─▶ gathers … …           5 is more than the fewest, and no lower rank has more: speaks for all
    rank 1: 6 ─▶ waits for rank 0 …
    rank 2: 4, writes … … …            its disk hangs, though it lives (`pulse`): waited for

Each rank posts, in the store of the process group, how often it has come.
"""

import contextlib
import threading
import time
from typing import Any

import torch.distributed as dist

from puna.progress import say

#: Seconds of waiting before it is said for whom.
FIRST_SECONDS = 120.0

KEY = "puna/attendance"


class Attendance:
    """How often each rank of a group has come to where it waits for the others.

    Args:
        group: of all ranks.
    """

    def __init__(self, group: Any) -> None:
        self._rank = dist.get_rank(group)
        store: Any = dist.distributed_c10d._get_default_store()
        self._store, self._asking = store.clone(), store.clone()  # connections of their own, as the pulse has
        self._keys = [f"{KEY}/{group.group_name}/{rank}" for rank in range(dist.get_world_size(group))]
        self._times = -1
        self.come()

    def come(self) -> None:
        """Posts that this rank has done its share, and waits from now on."""
        self._times += 1
        self._since, self._said_at = time.monotonic(), FIRST_SECONDS
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that keeps it
            self._store.set(self._keys[self._rank], str(self._times))

    def look(self) -> None:
        """While waiting: says for whom, where it is time to, and this rank is the one to say it."""
        seconds = time.monotonic() - self._since
        if seconds < self._said_at:
            return
        self._said_at = 2 * seconds
        # In a thread that can be left behind: where the store's machine hangs, it never answers.
        threading.Thread(target=self._tell, args=(seconds,), daemon=True).start()

    def _tell(self, seconds: float) -> None:
        if late := self._late():
            who = f"rank {late[0]}" + (f" and {len(late) - 1} more" if late[1:] else "")
            say(f"waiting for {who} at a checkpoint for {seconds:,.0f} s; its disk may be slow, or hang")

    def _late(self) -> list[int]:
        """The ranks that have come least often, if this is the one to say so: the first of the others."""
        with contextlib.suppress(RuntimeError):
            if self._asking.check(self._keys):
                times = [int(posted) for posted in self._asking.multi_get(self._keys)]
                late = [rank for rank, count in enumerate(times) if count == min(times)]
                if self._rank == next((rank for rank in range(len(times)) if rank not in late), None):
                    return late
        return []
