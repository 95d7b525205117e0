"""An error that all ranks meet is said once a machine, by its first rank; an error of its own a rank says itself.

    no data/mine, on every rank     ─▶ a machine's first rank tells the others its error: it is theirs ─▶ it says it
    a full disk, on rank 5 alone    ─▶ the first rank has no error to tell ─▶ rank 5 says it
                                       it is the cause ─▶ the first ranks of other machines say it, too

The ranks meet in the store of their process group, which the first one keeps, rather than in a collective: those that
have no error are elsewhere.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from puna.errors import PunaError
from puna.progress import complain

#: Seconds that a rank waits for what the others say, and for the first to leave before it.
ANSWER_SECONDS, LEAVE_SECONDS = 5.0, 5.0

#: Where each rank leaves what it met, and the first of all leaves it for other machines.
KEY, CAUSE = "puna/error", "puna/cause"


class RankLost(PunaError):
    """Another rank ended: the cause is what that one met."""


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """While open, errors get an attribute `is_said`: whether the machine's first rank meets the same and says it."""
    try:
        yield
    except Exception as error:
        message = str(error) if isinstance(error, PunaError | OSError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, RankLost):
            _tell_cause(message)
        error.is_said = _is_said(message)  # type: ignore[attr-defined]
        if error.is_said:  # type: ignore[attr-defined]
            time.sleep(LEAVE_SECONDS)  # when one leaves, all are stopped: first the one that speaks
        raise


def complain_of_cause(store: dist.Store) -> bool:
    """Whether some rank has met an error; a machine's first rank says it where that was on another machine."""
    with contextlib.suppress(RuntimeError):  # the store is gone with the first rank
        if store.check([CAUSE]):
            machine, rank, message = json.loads(store.get(CAUSE))
            if dist.get_rank() == _first_here() != machine:
                complain(f"puna: on another machine, rank {rank}: {message}")
            return True
    return False


def _first_here() -> int:
    """The first rank of this machine."""
    rank = dist.get_rank()
    return rank - int(os.environ.get("LOCAL_RANK", rank))


def _tell_cause(message: str) -> None:
    with contextlib.suppress(RuntimeError):
        _store().compare_set(CAUSE, "", json.dumps([_first_here(), dist.get_rank(), message]))


def _is_said(message: str) -> bool:
    """Tells the others, and says whether the first rank of this machine tells the same."""
    store, rank, first = _store(), dist.get_rank(), _first_here()
    with contextlib.suppress(RuntimeError):
        if rank != first:
            _wait(lambda: store.check([f"{KEY}/{first}"]))
        is_same = rank != first and store.check([f"{KEY}/{first}"]) and store.get(f"{KEY}/{first}").decode() == message
        store.set(f"{KEY}/{rank}", message)
        if rank == 0:  # it keeps the store until all have looked
            others = [f"{KEY}/{other}" for other in range(1, dist.get_world_size())]
            _wait(lambda: not others or store.check(others))
        return is_same
    return False


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _wait(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while not is_there() and time.monotonic() < deadline:
        time.sleep(0.05)
