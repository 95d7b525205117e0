"""Python processes that do work for this one.

Where this process has one thread, they are copies of it (forks), made when there is an item for them: that takes a
millisecond, and a copy has loaded all that it needs. Where it has more, a copy might wait for ever for a lock that
another thread held; so they are fresh processes then, and the work is pickled and sent to them. Ctrl-C does not reach
them: the process that started them gets it, and ends them. They end by themselves when that process is gone, and keep
none of its files open.

Not `multiprocessing`: that runs the caller's main script again in every fresh process, which fails in notebooks, under
`python -` and in scripts without `if __name__ == "__main__"`. These import puna alone.
"""

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NoReturn, Self, TypeVar

import puna
from puna.errors import PunaError
from puna.garbage import seldom_collected

Item = TypeVar("Item")
Result = TypeVar("Result")

_PROGRAM = "from puna.data.workers import _serve; _serve()"

#: The thread of Arrow's allocator, jemalloc, which readies its locks for a fork and starts again in the copy.
_RENEWED = "jemalloc_bg_thd"


class Workers(Generic[Item, Result]):
    """Calls `work(item)` for many items, in `count` processes; with one, in this process.

    Args:
        work: what to do; items and results are pickled, and so is `work` for fresh processes.
        count: how many processes.
    """

    def __init__(self, work: Callable[[Item], Result], count: int) -> None:
        self.work, self.count = work, count
        self._processes: list[subprocess.Popen[bytes] | _Copy] = []
        self._channels: dict[Connection, Connection] = {}  # where results come from -> where items go to

    def start(self) -> None:
        """Starts fresh processes ahead of `map`, so that they load what they need meanwhile; copies need not."""
        while self.count > 1 and len(self._processes) < self.count and not can_be_copied():
            self._begin()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order in which they come.

        Raises:
            Exception: whatever `work` raised, at once; `PunaError` if a process died.
        """
        waiting = iter(items)
        first = list(islice(waiting, 2))
        if not self._processes and len(first) < 2:
            self.count = 1  # not worth a process
        waiting = chain(first, waiting)
        if self.count == 1:
            yield from map(self.work, waiting)
            return
        busy = {results for results in self._channels if self._give(results, waiting)}
        for item in islice(waiting, self.count - len(self._processes)):
            begun = self._begin()
            self._send(begun, item)
            busy.add(begun)
        while busy:
            for results in wait(list(busy)):
                assert isinstance(results, Connection)
                yield self._take(results)
                if not self._give(results, waiting):
                    busy.remove(results)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for results, items in self._channels.items():
            items.close()
            results.close()
        for process in self._processes:
            process.kill()  # nothing is lost: files are whole or not there
        for process in self._processes:
            process.wait()

    def _begin(self) -> Connection:
        """Starts a process; returns where its results come from."""
        (item_reader, item_writer), (result_reader, result_writer) = os.pipe(), os.pipe()
        results, items = Connection(result_reader, writable=False), Connection(item_writer, readable=False)
        try:
            if can_be_copied():
                self._processes.append(_Copy(self.work, item_reader, result_writer))
            else:
                self._processes.append(_fresh(item_reader, result_writer))
                items.send(self.work)
        finally:
            os.close(item_reader)
            os.close(result_writer)
        self._channels[results] = items
        return results

    def _give(self, results: Connection, waiting: Iterator[Item]) -> bool:
        for item in waiting:
            self._send(results, item)
            return True
        return False

    def _send(self, results: Connection, item: Item) -> None:
        try:
            self._channels[results].send(item)
        except BrokenPipeError:
            raise self._died(results) from None

    def _take(self, results: Connection) -> Result:
        try:
            is_error, value, where = results.recv()
        except (EOFError, ConnectionResetError):
            raise self._died(results) from None
        if is_error:
            value.add_note(where)
            raise value
        return value

    def _died(self, results: Connection) -> PunaError:
        process = self._processes[list(self._channels).index(results)]
        code = process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return PunaError(
            f"a worker process ended unexpectedly ({how}; the machine may have run out of memory); "
            "run the same command again to continue, with fewer workers if it happens again"
        )


def can_be_copied() -> bool:
    """Whether this process has no thread that a copy of it would lack; False where that cannot be found out."""
    try:
        names = [Path(thread, "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    except OSError:
        return False
    return len(names) - names.count(_RENEWED) == 1


class _Copy:
    """A copy of this process that does work; what `subprocess.Popen` is for a fresh one."""

    def __init__(self, work: Callable[[Any], Any], items: int, results: int) -> None:
        self._code: int | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # until the copy has its own handlers
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 counts the renewed thread, too
                self._pid = os.fork()
            if not self._pid:
                _become_worker(work, items, results, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def kill(self) -> None:
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._code


def _become_worker(work: Callable[[Any], Any], items: int, results: int, mask: set[Any]) -> NoReturn:
    """What a copy does; it must never return to the code that forked it."""
    try:
        gc.freeze()  # or an old object, collected later, would close a file number that is in use anew
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.dup2(items, 0)
        os.dup2(results, 1)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(int(name))
        _serve(work)
    finally:
        os._exit(1)


def _fresh(items: int, results: int) -> "subprocess.Popen[bytes]":
    home = str(Path(puna.__file__).parents[1])
    paths = os.pathsep.join(path for path in [home, os.environ.get("PYTHONPATH")] if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=items, stdout=results, env=environment, process_group=0
    )


@seldom_collected()
def _serve(work: Callable[[Any], Any] | None = None) -> None:
    """What a worker process does: takes the work, if it has none, then items until there are no more."""
    items, results = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # whatever a library prints must not get between the results
    threading.Thread(target=_end_when_left_alone, daemon=True).start()
    try:
        work = items.recv() if work is None else work
        while True:
            item = items.recv()
            results.send(_outcome(work, item))
    except (EOFError, OSError):  # the process that started this one is done, or gone
        os._exit(0)


def _end_when_left_alone() -> None:
    """Ends this process when the one that started it is gone, so that it does not write while a later run does."""
    poll = select.poll()
    poll.register(0, 0)  # only that the other end was closed
    poll.poll()
    os._exit(1)


def _outcome(work: Callable[[Any], Any], item: Any) -> tuple[bool, Any, str]:
    try:
        return False, work(item), ""
    except Exception as error:
        return True, error, f"in a worker process:\n{traceback.format_exc()}"
