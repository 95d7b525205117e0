"""What the tests of checkpoints share: processes that are quick to start, and one that measures its memory."""

import contextlib
import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext

import pytest

from puna.testing import PeakAnonymousMemory

#: glibc's name for the size from which a block is mapped alone, and given back once it is free.
M_MMAP_THRESHOLD = -3


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Processes forked from one that has loaded torch, and nothing else."""
    context = multiprocessing.get_context("forkserver")
    # What fails to be imported there ends it with no word but EOFError here: our own modules report for themselves.
    context.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.tensor"])
    return context


@pytest.fixture(scope="session")
def peak_anonymous_bytes(processes: ForkServerContext) -> Callable[..., int]:
    """Calls a function in a process of its own; gives the most that its anonymous memory grew."""

    def measure(function: Callable[..., object], *arguments: object) -> int:
        with ProcessPoolExecutor(1, mp_context=processes) as pool:
            return pool.submit(measured, function, arguments).result()

    return measure


def measured(function: Callable[..., object], arguments: tuple[object, ...]) -> int:
    with contextlib.suppress(AttributeError):  # glibc may keep a free block of some MB, by chance
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    with PeakAnonymousMemory() as memory:
        result = function(*arguments)
    del result
    return memory.grown_bytes
