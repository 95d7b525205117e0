"""Lines of a log: those that are whole are gone on with, whenever the run before ended."""

from pathlib import Path

import pytest

from puna.errors import PunaError
from puna.log import open_log


def test_two_runs_do_not_write_one_log(tmp_path: Path) -> None:
    with open_log(tmp_path / "log") as log:
        with pytest.raises(PunaError, match=r"another process is writing \S+log; wait for it"):
            open_log(tmp_path / "log").__enter__()
        log.append({"a": 1})
    with open_log(tmp_path / "log") as log:
        assert log.lines == [{"a": 1}]


@pytest.mark.parametrize("heads", [("", ""), ("asked", "asked otherwise")])
def test_without_locks_lines_of_two_runs_that_begin_a_log_at_once_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: tuple[str, str]
) -> None:
    monkeypatch.setattr("puna.files.try_lock", lambda file: None)
    path, (one, other) = tmp_path / "log", heads
    with open_log(path, head=one) as first, open_log(path, head=other) as second:
        first.append(1)
        second.append(2)
    with open_log(path, head=other) as log:
        assert log.lines == [2]


@pytest.mark.parametrize("head", ["", "asked"])
@pytest.mark.parametrize("damaged", [b"\xff\n", b"\0\0\n", b'{"number": \n'])
def test_a_damaged_line_is_named_and_the_others_stay(tmp_path: Path, head: str, damaged: bytes) -> None:
    path, first = tmp_path / "log", f"{head}\n".encode() if head else b""
    before, place = first + b"1\n2\n", 4 if head else 3
    path.write_bytes(before + damaged + b"4\n")
    with pytest.raises(PunaError, match=rf"log:{place} is damaged \(.*\); remove that line"):
        open_log(path, head=head).__enter__()
    assert path.read_bytes() == before + damaged + b"4\n"
    path.write_bytes(before + b"4\n")
    with open_log(path, head=head) as log:
        assert log.lines == [1, 2, 4]


@pytest.mark.parametrize("head", ["", "asked"])
def test_a_log_goes_on_behind_its_last_whole_line(tmp_path: Path, head: str) -> None:
    path, first = tmp_path / "log", f"{head}\n" if head else ""
    with open_log(path, head=head) as log:
        for number in range(3):
            log.append({"number": number})
    whole = path.read_bytes()
    assert whole.decode() == first + '{"number": 0}\n{"number": 1}\n{"number": 2}\n'
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut] + "é".encode()[:1])  # as a kill may leave it
        with open_log(path, head=head) as log:
            kept = [line["number"] for line in log.lines]
            log.append({"number": "new"})
        assert kept == list(range(whole[:cut].count(b"}\n")))
        assert path.read_text() == "".join([first, *(f'{{"number": {n}}}\n' for n in kept), '{"number": "new"}\n'])


def test_a_log_that_belongs_to_something_else_is_neither_taken_up_nor_lost(tmp_path: Path) -> None:
    with open_log(path := tmp_path / "log", head="asked"):
        pass
    with open_log(path, head="asked otherwise") as log:  # there was nothing yet
        log.append(1)
    with pytest.raises(PunaError, match=r"log was begun by another run, with other prompts, options or files"):
        open_log(path, head="asked").__enter__()
    assert path.read_text() == "asked otherwise\n1\n"


def test_lines_that_are_kept_nowhere_are_taken_all_the_same() -> None:
    with open_log(None, head="asked") as log:
        log.append(1)
    assert log.lines == []
