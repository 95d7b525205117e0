"""Collectives of the ranks that save and load checkpoints together: an error of one is raised on all.

A rank that fails alone leaves the others in a collective that never ends. Here all work is done in collectives: every
rank does its share and then says how it went; what went wrong anywhere is raised everywhere, with the same words. They
have a gloo group of their own, so that they may go on in the background of training and its collectives.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from puna.checkpoint.heartbeat import Heartbeat
from puna.errors import PunaError, UsageError

T = TypeVar("T")
R = TypeVar("R")

#: How long a rank may write or read while the others wait. One that dies is noticed at once, and one that gives no sign
#: of life after some minutes; who is waited for is said (`puna.checkpoint.heartbeat`).
PATIENCE = timedelta(hours=2)

#: Seconds between two checks that all others are alive.
CHECK_SECONDS = 1.0


class Collectives:
    """Collectives of the ranks of a run, or of one process alone.

    Args:
        group: joins the ranks, with a backend for the CPU; None: this process needs nobody.

    Attributes:
        rank, size: of this process in the group.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._heartbeat = Heartbeat(group) if self.size > 1 else None

    @classmethod
    def of_run(cls) -> "Collectives":
        """Those of all ranks, over a new group, or of this process alone where there is no process group.

        Every rank must call it.
        """
        return cls(dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which does what is done once."""
        return self.rank == 0

    def reduce_scatter(self, work: Callable[[], T], reduce: Callable[[list[T]], list[R]]) -> R:
        """Every rank works, rank 0 decides on what came out, and each gets its part of the decision.

        Args:
            work: this rank's share.
            reduce: from every rank's result to what each is told.

        Raises:
            Exception: `work` failed somewhere, or `reduce` did; every rank raises it.
        """
        if self.size == 1:
            return reduce([work()])[0]
        own, result = _attempt(work, self.rank)
        results = self._gather(result)
        replies: list[Any] | None = None
        if results is not None:
            failures: list[Any] = [result for result in results if isinstance(result, _Failure)]
            if not failures:
                own, replies = _attempt(lambda: reduce(results), self.rank)
                failures = [replies] if isinstance(replies, _Failure) else []
            if failures:
                replies = failures[:1] * self.size
        reply = self._scatter(replies)
        if isinstance(reply, _Failure):
            raise reply.error from own
        return reply

    def all_reduce(self, work: Callable[[], T], reduce: Callable[[list[T]], R]) -> R:
        """As `reduce_scatter`, with one decision for all."""
        return self.reduce_scatter(work, lambda results: [reduce(results)] * self.size)

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """As `all_reduce`; each is told all results."""
        return self.all_reduce(work, lambda results: results)

    def broadcast(self, work: Callable[[], R]) -> R:
        """Rank 0 works and tells all."""
        return self.all_reduce(lambda: None, lambda _: work())

    def _gather(self, value: Any) -> list[Any] | None:
        values = [None] * self.size if self.is_first else None
        self._wait_for(lambda: dist.gather_object(value, values, dst=0, group=self._group))
        return values

    def _scatter(self, values: list[Any] | None) -> Any:
        mine = [None]
        self._wait_for(lambda: dist.scatter_object_list(mine, values, src=0, group=self._group))
        return mine[0]

    def _wait_for(self, collective: Callable[[], Any]) -> None:
        """Takes part in a collective, in a thread that can be left behind in it."""
        assert self._heartbeat is not None
        done: Future[None] = Future()

        def take_part() -> None:
            try:
                done.set_result(collective())
            except Exception as error:
                done.set_exception(error)

        threading.Thread(target=take_part, daemon=True).start()
        with self._heartbeat.in_collective():
            while not wait([done], CHECK_SECONDS).done:
                self._heartbeat.check()
        with _plain_errors():
            done.result()


@dataclass(frozen=True)
class _Failure:
    """What a rank could not do; travels in the place of its result."""

    error: Exception


def _attempt(work: Callable[[], Any], rank: int) -> tuple[Exception | None, Any]:
    """What went wrong, and the result or the failure that stands for it."""
    try:
        return None, work()
    except Exception as error:
        is_plain = type(error) in (PunaError, UsageError) or isinstance(error, OSError)
        told = error if is_plain else RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
        return error, _Failure(told)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PunaError(
            f"another rank left, or did not answer for {PATIENCE.total_seconds() / 3600:g} hours, while all worked on "
            "a checkpoint; its own output says why"
        ) from error
