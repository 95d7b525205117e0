"""An error that all ranks meet is said once, by the first of them; an error of its own a rank says itself.

    no data/mine, on every rank     ─▶ rank 0 tells the others its error: it is theirs ─▶ rank 0 says it
    a full disk, on rank 1 alone    ─▶ rank 0 has no error to tell                     ─▶ rank 1 says it

The ranks meet in the store of their process group, which the first one keeps, rather than in a collective: those that
have no error are elsewhere.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from puna.errors import PunaError

#: Seconds that a rank waits for what the others say, and for the first to leave before it.
ANSWER_SECONDS, LEAVE_SECONDS = 5.0, 5.0

KEY = "puna/error"


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """While open, errors get an attribute `is_said`: whether the first rank meets the same and says it."""
    try:
        yield
    except (PunaError, OSError) as error:
        error.is_said = _is_said(str(error))  # type: ignore[union-attr]
        if error.is_said:  # type: ignore[union-attr]
            time.sleep(LEAVE_SECONDS)  # when one leaves, all are stopped: first the one that speaks
        raise


def _is_said(message: str) -> bool:
    """Tells the others, and says whether the first rank tells the same."""
    store: Any = dist.distributed_c10d._get_default_store()
    rank, (first, *others) = dist.get_rank(), [f"{KEY}/{rank}" for rank in range(dist.get_world_size())]
    with contextlib.suppress(RuntimeError):  # the store is gone with the first rank
        if rank == 0:
            store.set(first, message)
            _wait(lambda: not others or store.check(others))
            return False
        _wait(lambda: store.check([first]))
        is_same = store.check([first]) and store.get(first).decode() == message
        store.set(f"{KEY}/{rank}", message)  # the first keeps the store until all have looked
        return is_same
    return False


def _wait(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while not is_there() and time.monotonic() < deadline:
        time.sleep(0.05)
