"""Whoever waits at a checkpoint asks the store nothing: it may never answer."""

import threading
from types import SimpleNamespace

import pytest

from puna.checkpoint import heartbeat
from puna.checkpoint.heartbeat import Heartbeat


class SilentStore:
    """The store of a machine that hangs."""

    def __init__(self) -> None:
        self.was_asked, self.ends, self.connections = threading.Event(), threading.Event(), 0

    def clone(self) -> "SilentStore":
        self.connections += 1
        return self

    def set(self, key: str, value: str) -> None:
        self.was_asked.set()
        self.ends.wait()
        raise RuntimeError("the store is gone")


def test_a_store_that_never_answers_does_not_hold_up_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    store = SilentStore()
    monkeypatch.setattr(heartbeat.dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(heartbeat.dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(heartbeat.dist, "get_world_size", lambda group: 2)

    def work() -> None:
        beats = Heartbeat(SimpleNamespace(group_name="all"))
        assert store.was_asked.wait(timeout=5)
        with beats.in_collective():
            beats.check()

    working = threading.Thread(target=work, daemon=True)
    working.start()
    working.join(timeout=10)
    is_held_up = working.is_alive()
    store.ends.set()
    assert not is_held_up
    assert store.connections == 1  # rank 0's host keeps one open for each rank
