"""Saying who is waited for never holds up whoever waits."""

import threading
from types import SimpleNamespace

import pytest

from puna.checkpoint import attendance
from puna.checkpoint.attendance import Attendance


class SilentStore:
    """The store of a machine that hangs: it takes what is posted, and never answers."""

    def __init__(self) -> None:
        self.was_asked, self.ends = threading.Event(), threading.Event()

    def clone(self) -> "SilentStore":
        return self

    def set(self, key: str, value: str) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        self.was_asked.set()
        self.ends.wait()
        return False


def test_a_store_that_never_answers_does_not_hold_up_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    store = SilentStore()
    monkeypatch.setattr(attendance, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(attendance.dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(attendance.dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(attendance.dist, "get_world_size", lambda group: 2)
    looking = threading.Thread(target=Attendance(SimpleNamespace(group_name="all")).look, daemon=True)
    looking.start()
    looking.join(timeout=5)
    is_held_up = looking.is_alive()
    assert store.was_asked.wait(timeout=5)
    store.ends.set()
    assert not is_held_up
