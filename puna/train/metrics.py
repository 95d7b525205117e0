"""Numbers of a run: metrics.jsonl, one JSON object a step, and TensorBoard where asked for.

JSON has no word for a number that is not finite, as the loss of a step that was skipped: it is written as null.

A run that continues cuts the file back to its checkpoint, so the file reads as if the run had never stopped.
"""

import json
import math
from io import FileIO
from pathlib import Path
from typing import Any, Self

from puna.errors import PunaError
from puna.files import file_aside
from puna.progress import say

FILE = "metrics.jsonl"


class Metrics:
    """Appends the numbers of each step to `run_dir/metrics.jsonl`.

    Args:
        run_dir: the run folder.
        step: the step that the run continues from; later lines are cut off.
        tensorboard: also write TensorBoard events, under `run_dir/tensorboard`.
    """

    def __init__(self, run_dir: Path, *, step: int, tensorboard: bool = False) -> None:
        self._path = run_dir / FILE
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
        with file_aside(self._path, "w") as file:
            file.writelines(as_json(line) + "\n" for line in kept)
        self._file = self._opened()
        self._waiting = b""
        self._board = _summary_writer(run_dir / "tensorboard", step) if tensorboard else None

    def write(self, numbers: dict[str, Any]) -> None:
        """Writes one step's numbers; `numbers["step"]` says which. What cannot be written waits for the next call."""
        is_first = not self._waiting
        self._waiting += f"{as_json(numbers)}\n".encode()
        try:
            if self._path.parent.is_dir() and not self._path.exists():  # the folder was removed, and made again
                self._file.close()
                self._file = self._opened()
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:  # a full disk ends no training: numbers are little, and the state is in memory
            if is_first:
                say(f"{self._path} cannot be written to ({error.strerror}); its lines wait in memory")
        if self._board is not None:
            try:
                for name, value in numbers.items():
                    if name != "step" and value is not None:
                        self._board.add_scalar(name, value, numbers["step"])
            except OSError as error:
                self._give_up_board(error)

    def _give_up_board(self, error: OSError) -> None:
        """Its writer cannot go on after an error; `metrics.jsonl` has the same numbers."""
        say(f"TensorBoard gets no more numbers of this run: its events cannot be written ({error})")
        self._board = None

    def _opened(self) -> FileIO:
        return open(self._path, "ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                self._give_up_board(error)


def as_json(numbers: dict[str, Any]) -> str:
    """A JSON object of one line, in which numbers that are not finite are null."""
    lost = {name for name, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({name: None if name in lost else value for name, value in numbers.items()})


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The numbers of every step so far, None for one that was not finite.

    A last line that a kill cut off is left out, and what a crash spoiled.
    """
    path = run_dir / FILE
    if not path.is_file():
        return []
    read: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            read.append(json.loads(line, parse_constant=lambda _: None))
        except ValueError:  # steps are not synced to the disk; checkpoints are
            say(f"{path}: line {number} is not JSON, and is left out")
    return read


def _summary_writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise PunaError("log.tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=step + 1)
