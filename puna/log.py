"""Lines that are written while work is done, so that a run that is killed goes on with what it has."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from puna.errors import PunaError
from puna.files import lock


class Log:
    """JSON lines that are written while work is done.

    Attributes:
        lines: those that were there at the start.
    """

    def __init__(self, lines: Iterable[Any] = (), file: IO[bytes] | None = None) -> None:
        self.lines, self._file = list(lines), file

    def append(self, line: Any) -> None:
        """Writes a line at once, if there is a file."""
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()


@contextlib.contextmanager
def open_log(path: Path | None, *, head: str = "", name: Path | None = None) -> Iterator[Log]:
    """Goes on with the lines of a file, or begins them; what a kill or a full disk cut off in the last one is dropped.

    Args:
        path: of the file; None: lines are kept nowhere.
        head: what the lines belong to: stands in a line before them, if it is not empty.
        name: what the work is on, for messages; the file by default.

    Raises:
        PunaError: another process is writing it, its lines belong to something else, or they are damaged.
    """
    if path is None:
        yield Log()
        return
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "a+b"))
        is_locked = lock(file, name or path)
        first = f"{head}\n".encode() if head else b""
        file.seek(0)
        found = file.readline() if head else b""
        lines = [line for line in file if line.endswith(b"\n")]
        if lines and found != first:
            raise PunaError(
                f"{path} was begun by another run, with other prompts, options or files; repeat its command to go on "
                "with it, choose another output, or remove the file"
            )
        there = list(_read(lines, path, 2 if head else 1))
        if lines:
            file.truncate(len(first) + sum(map(len, lines)))
        else:
            if not is_locked:  # one that writes it too, and may ask something else, goes on in a file without a name
                path.unlink(missing_ok=True)
                file = stack.enter_context(open(path, "a+b"))
            file.truncate(0)
            file.write(first)
        yield Log(there, file)


def _read(lines: list[bytes], path: Path, start: int) -> Iterator[Any]:
    for number, line in enumerate(lines, start):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PunaError(f"{path}:{number} is damaged ({error}); remove that line to have it made again") from None
