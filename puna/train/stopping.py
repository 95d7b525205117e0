"""A run that is told to stop ends after the step that it is in, with its state saved."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from puna.progress import leave_terminal, say

#: Signals that come so soon after the first are the same request: where all processes of a group or a job are told,
#: those that `--nproc` started are told by the process that started them, too.
SAME_SECONDS = 1.0


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """While open, the signals that end a process are noted instead of obeyed.

    Yields:
        A function that says which came, 0 if none did. Where SIGHUP is ignored, as under nohup, it stays so.
    """
    came: list[int] = []
    at_once: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_IGN,  # a terminal that is closed sends it, and its shell does so again
    }
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        del at_once[signal.SIGHUP]

    def note(number: int, frame: object) -> None:
        if came:
            return
        came.append(number)
        if number == signal.SIGHUP:
            leave_terminal()
        say("stopping after this step; once more to stop at once")
        time.sleep(SAME_SECONDS)
        signal.raise_signal(number)  # has Python give us what came together with it: what waits is lost below
        for each in previous:  # the system's own handlers end a process that waits for others in vain, too
            signal.signal(each, at_once[each])

    try:
        previous = {number: signal.signal(number, note) for number in at_once}
    except ValueError:  # not the main thread: whoever runs it there also stops it
        previous = {}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
