"""Python processes that do work for this one.

Not `multiprocessing`: that runs the caller's main script again in every process, which fails in notebooks, under
`python -` and in scripts without `if __name__ == "__main__"`. These processes import puna alone, do not hear Ctrl-C
(who started them does, and ends them), and end by themselves when whoever started them is gone.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import puna
from puna.errors import PunaError
from puna.garbage import seldom_collected

Item = TypeVar("Item")
Result = TypeVar("Result")

_PROGRAM = "from puna.data.workers import _serve; _serve()"


class Workers(Generic[Item, Result]):
    """Calls `work(item)` for many items, in `count` processes; with one, in this process.

    Args:
        work: what to do; it, its items and its results travel by pickle.
        count: how many processes.
    """

    def __init__(self, work: Callable[[Item], Result], count: int) -> None:
        self.work, self.count = work, count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: dict[Connection, Connection] = {}  # where results come from -> where items go to

    def start(self) -> None:
        """Starts the processes ahead of `map`, so that they load what they need meanwhile."""
        if self._processes or self.count == 1:
            return
        home = str(Path(puna.__file__).parents[1])
        paths = os.pathsep.join(path for path in [home, os.environ.get("PYTHONPATH")] if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        for _ in range(self.count):
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                process_group=0,
            )
            assert process.stdin is not None
            assert process.stdout is not None
            self._processes.append(process)
            items = Connection(os.dup(process.stdin.fileno()), readable=False)
            results = Connection(os.dup(process.stdout.fileno()), writable=False)
            process.stdin.close()
            process.stdout.close()
            self._channels[results] = items
            items.send(self.work)

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
        self.start()
        busy = {results for results in self._channels if self._give(results, waiting)}
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

    def _give(self, results: Connection, waiting: Iterator[Item]) -> bool:
        for item in waiting:
            try:
                self._channels[results].send(item)
            except BrokenPipeError:
                raise self._died(results) from None
            return True
        return False

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


@seldom_collected()
def _serve() -> None:
    """What a worker process does: takes the work, then items until there are no more."""
    items, results = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # whatever a library prints must not get between the results
    threading.Thread(target=_end_when_left_alone, daemon=True).start()
    try:
        work = items.recv()
        while True:
            item = items.recv()
            results.send(_outcome(work, item))
    except (EOFError, OSError):  # whoever started this process is done, or gone
        os._exit(0)


def _end_when_left_alone() -> None:
    """Ends this process when whoever started it is gone: nothing is written behind a later run's back."""
    poll = select.poll()
    poll.register(0, 0)  # only that the other end was closed
    poll.poll()
    os._exit(1)


def _outcome(work: Callable[[Any], Any], item: Any) -> tuple[bool, Any, str]:
    try:
        return False, work(item), ""
    except Exception as error:
        return True, error, f"in a worker process:\n{traceback.format_exc()}"
