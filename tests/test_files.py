"""Files that are whole or not there, wherever their name leads."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from puna.errors import PunaError
from puna.files import (
    ASIDE,
    check_file,
    check_writable,
    file_aside,
    folder_aside,
    lock,
    read_json,
    try_lock,
    write_json,
)


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with file_aside(pipe, "w") as file:
        file.write("whole")
    reader.join(timeout=10)
    assert read == ["whole"]
    assert pipe.is_fifo()


def test_a_link_stays_and_leads_to_the_new_content(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/there").write_text("old")
    (tmp_path / "here").symlink_to("far/there")
    with file_aside(tmp_path / "here", "w") as file:
        file.write("new")
    assert (tmp_path / "here").is_symlink()
    assert (tmp_path / "far/there").read_text() == "new"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="is a folder; name a file"):
        write_json(tmp_path, {})
    with pytest.raises(PunaError, match="is a folder; name a file"):
        check_file(tmp_path)


def test_a_folder_that_another_process_made_meanwhile_is_left_alone(tmp_path: Path) -> None:
    aside = folder_aside(tmp_path / "made")
    aside.__enter__()
    (tmp_path / "made").mkdir()
    (tmp_path / "made/theirs").touch()
    with pytest.raises(PunaError, match="made exists already; choose another place"):
        aside.__exit__(None, None, None)
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "theirs"]


def test_what_a_killed_process_left_of_a_folder_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    code = "import sys, time; from puna.files import folder_aside\nwith folder_aside(sys.argv[1]) as aside:\n"
    code += " (aside / 'half').touch(); print(aside, flush=True); time.sleep(100)"
    writers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / name], stdout=subprocess.PIPE, text=True)
        for name in ("made", "made", "made.2")
    ]
    dead, living, other = (Path(writer.stdout.readline().strip()) for writer in writers if writer.stdout)
    for writer in (writers[0], writers[2]):
        writer.kill()
        writer.wait()
    with folder_aside(tmp_path / "made"):
        assert (living / "half").exists()
        assert other.exists()
        assert not dead.exists()
    writers[1].kill()
    writers[1].communicate()
    for writer in writers:
        assert writer.stdout
        writer.stdout.close()


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize(("module", "name"), [(os, "open"), (fcntl, "flock")])
def test_a_folder_that_another_process_takes_for_dead_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, is_done: bool
) -> None:
    call, opened, locked, taken = getattr(module, name), os.open, fcntl.flock, []

    def after_the_other(*arguments: Any, **options: Any) -> Any:
        if not taken:
            folder = next(tmp_path.iterdir())
            taken.append(opened(folder, os.O_RDONLY))
            locked(taken[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_done:
                folder.rmdir()
                os.close(taken[0])
        return call(*arguments, **options)

    monkeypatch.setattr(module, name, after_the_other)
    with folder_aside(tmp_path / "made") as aside:
        if not is_done:
            next(place for place in tmp_path.iterdir() if place != aside).rmdir()
            os.close(taken[0])
        (aside / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "whole"]


def test_a_file_system_without_locks_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> Callable[..., None]:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    with open(tmp_path / "lock", "w") as file:
        monkeypatch.setattr(fcntl, "flock", fails(errno.ENOSYS))
        assert try_lock(file) is None
        lock(file, "it")
        monkeypatch.setattr(fcntl, "flock", fails(errno.EAGAIN))
        assert try_lock(file) is False
        with pytest.raises(PunaError, match="another process is writing it"):
            lock(file, "it")
        monkeypatch.setattr(fcntl, "flock", fails(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            try_lock(file)


def test_a_link_that_leads_nowhere_is_no_free_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(PunaError, match="link exists already"), folder_aside(tmp_path / "link"):
        pass
    assert not list(tmp_path.glob(f"*{ASIDE}"))


def test_a_place_that_cannot_be_written_to_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new/newer")
    with pytest.raises(PunaError, match="file is a file; name a folder"):
        check_writable(tmp_path / "file/inside")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PunaError, match=f"{tmp_path} cannot be written to; choose another place"):
        check_writable(tmp_path / "new")


@pytest.mark.parametrize("content", ["[1]", "null", '"text"'])
def test_json_that_is_no_object_is_refused_where_one_belongs(tmp_path: Path, content: str) -> None:
    (tmp_path / "some.json").write_text(content)
    with pytest.raises(PunaError, match=r"some\.json is not a JSON object"):
        read_json(tmp_path / "some.json")


def test_json_that_is_nested_too_deeply_is_said(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(PunaError, match=r"deep\.json is not valid JSON"):
        read_json(tmp_path / "deep.json")
