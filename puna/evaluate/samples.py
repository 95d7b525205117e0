"""Files of tasks and samples: JSON lines, plain or gzipped, read strictly.

tasks       what a benchmark's authors publish, found by `data_file`
samples     {"task_id", "completion"}, OpenAI's: what follows the prompt
            {"task_id", "solution"}, EvalPlus': the whole program
"""

import gzip
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import PunaError, UsageError

#: Names the folder where official data files are looked for.
FOLDER_VARIABLE = "PUNA_DATA"

#: What a line of samples is, for messages.
SAMPLE_FORM = '{"task_id", "completion"} (what follows the prompt) or {"task_id", "solution"} (the whole program)'


class LinesError(PunaError):
    """A file that is not the JSON lines it should be."""


@dataclass(frozen=True)
class Sample:
    """An answer to a task.

    Attributes:
        task_id: of the task.
        text: what follows the prompt; or the whole program.
        is_whole: whether `text` is the whole program.
    """

    task_id: str
    text: str
    is_whole: bool = False

    def record(self) -> dict[str, str]:
        """The sample as a line of a file."""
        return {"task_id": self.task_id, "solution" if self.is_whole else "completion": self.text}


def data_file(benchmark: str, data: Path | str | None, name: str, where: str) -> Path:
    """The official file of a benchmark.

    Args:
        benchmark: its name, for the message.
        data: the file, or a folder that holds it; None: the folder that PUNA_DATA names.
        name: what the authors call the file.
        where: where to get it.

    Raises:
        UsageError: neither `data` nor PUNA_DATA.
        PunaError: there is no such file; the message says where to get it.
    """
    place = data if data is not None else os.environ.get(FOLDER_VARIABLE)
    get = f"{where}; name the file with --data, or its folder with the environment variable {FOLDER_VARIABLE}"
    if not place:
        raise UsageError(f"{benchmark} needs its official data file {name}: {get}")
    path = Path(place) / name if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise PunaError(f"{path} does not exist; {get}")
    return path


def read_samples(path: Path | str, task_ids: Collection[str]) -> list[Sample]:
    """The samples of a file, every task having at least one.

    Raises:
        PunaError: a line is no sample or of no task (the message names it), or tasks have none.
    """
    samples = []
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise PunaError(f"{path} {what}; name a file of JSON lines, each {SAMPLE_FORM}")
    for number, line in read_lines(path, {"task_id": str}):
        where = f"{path}, line {number}"
        if line["task_id"] not in task_ids:
            raise PunaError(f"{where}: there is no task {line['task_id']!r}; there is {next(iter(task_ids))!r} …")
        samples.append(read_sample(line, where))
    missing = sorted(set(task_ids) - {sample.task_id for sample in samples})
    if missing:
        raise PunaError(
            f"{path} has no sample for {len(missing)} of {len(task_ids)} tasks, {missing[0]} among them; "
            "a score over some of the tasks would compare with no other"
        )
    return samples


def read_sample(line: Mapping[str, Any], where: str) -> Sample:
    """The sample of a line that has a `task_id`.

    Raises:
        PunaError: it has neither completion nor solution; the message begins with `where` it is.
    """
    for name, is_whole in (("solution", True), ("completion", False)):
        if isinstance(line.get(name), str):
            return Sample(line["task_id"], line[name], is_whole)
    raise PunaError(f"{where}: no text under completion or solution; each line must be {SAMPLE_FORM}")


def read_lines(path: Path | str, fields: Mapping[str, type | tuple[type, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file of lines, with their line numbers.

    Args:
        path: plain, or gzipped if its name ends in .gz.
        fields: what each object must have, and of which type.

    Raises:
        LinesError: the file is missing or cut off, or a line is not such an object; the message names file and line.
    """
    path = Path(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, _line(text, fields, f"{path}, line {number}")
    except FileNotFoundError:
        raise LinesError(f"{path} does not exist") from None
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise LinesError(f"{path} is damaged or cut off ({error}); fetch it again") from None


def _line(text: str, fields: Mapping[str, type | tuple[type, ...]], where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LinesError(f"{where}: not JSON ({error}); each line must be an object with {', '.join(fields)}") from None
    is_object = isinstance(line, dict)
    lacking = [name for name, kind in fields.items() if not is_object or not isinstance(line.get(name), kind)]
    if lacking:
        raise LinesError(
            f"{where}: nothing usable under {', '.join(lacking)}; each line must be an object with {', '.join(fields)}"
        )
    return line
