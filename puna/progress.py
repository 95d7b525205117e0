"""Progress of long work, on stderr: a live bar in a terminal, a line every few seconds elsewhere.

A bar is drawn by whoever advances it, not by a thread, beside which no process could be copied (see `data.workers`).
stdout stays free for data. `Progress` knows nothing of what it counts; callers say unit and total. Of several processes
that torchrun started, the first speaks for all; only what went wrong is said by whoever it befell. Work does not end
because nobody can hear of it: a pipe whose reader has left, or a full disk that holds the log, loses lines and no more.
"""

import contextlib
import os
import stat
import sys
import time
from types import TracebackType
from typing import Any, Self

#: Seconds between two lines where stderr is not a terminal.
LINE_EVERY_SECONDS = 5.0

#: Seconds after which work is long enough for a bar, and between two looks of it.
BAR_AFTER_SECONDS, BAR_EVERY_SECONDS = 0.5, 0.1


def say(message: str) -> None:
    """Prints one line for the person watching, on stderr."""
    if _is_speaker():
        _print(message)


def complain(message: str) -> None:
    """Prints what went wrong, on stderr; a rank that is not the first says which it is."""
    where = "" if _is_speaker() else f"[rank {os.environ['RANK']}] "
    _print(f"{where}{message}")


def leave_terminal() -> None:
    """Whatever is said from now on goes nowhere, for the terminal is gone; files and pipes stay."""
    with open(os.devnull, "wb") as nowhere:
        for number in (1, 2):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(nowhere.fileno(), number)


def _print(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


#: Those that are open, the innermost last.
_open: list["Progress"] = []


def still_at_work() -> None:
    """Shows the innermost progress if it is time; whoever works long before any of it is done calls it now and then.

    Where there are lines in place of a bar, only until something is done.
    """
    if _open and (_open[-1].in_terminal or not _open[-1].done):
        _open[-1].advance(0)


def _is_speaker() -> bool:
    return os.environ.get("RANK", "0") == "0"


class Progress:
    """Counts work that is done and shows it.

    Args:
        title: what is being done, e.g. "preparing".
        total: how much there is to do, in `unit`; None when nobody knows.
        unit: e.g. "files", "steps", "MB".
    """

    def __init__(self, title: str, total: float | None = None, unit: str = "") -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0.0
        self._note = ""
        self._started = self._last_shown = time.monotonic()
        self.in_terminal = sys.stderr.isatty() and _is_speaker()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        _open.append(self)
        return self

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Adds `amount` to what is done; `note` is shown behind the bar."""
        self.done += amount
        self._note = self._note if note is None else note
        wait = BAR_EVERY_SECONDS if self._bar else BAR_AFTER_SECONDS if self.in_terminal else LINE_EVERY_SECONDS
        if time.monotonic() - self._last_shown >= wait:
            self._show()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.remove(self)
        if self._bar is not None:
            self._show()
            self._bar.stop()
        elif self.done and kind is None:
            self._line()

    def _show(self) -> None:
        self._last_shown = time.monotonic()
        if not self.in_terminal:
            self._line()
            return
        if self._bar is None:
            self._begin_bar()
        self._bar.update(self._task, completed=self.done, note=self._note, refresh=True)

    def _begin_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(
                "{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"
                if self.total
                else "{task.completed:,.0f} {task.fields[unit]}"
            ),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self._task = self._bar.add_task(self.title, total=self.total, unit=self.unit, note="")
        self._bar.tasks[0].start_time = self._started
        self._bar.start()

    def _line(self) -> None:
        of = f"/{self.total:,.0f}" if self.total else ""
        elapsed = time.monotonic() - self._started
        say(f"{self.title}: {self.done:,.0f}{of} {self.unit} in {elapsed:.0f} s {self._note}".rstrip())
