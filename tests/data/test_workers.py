"""Processes that work for another one: copies of it and fresh ones, which do the same."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from puna.data.workers import can_be_copied

#: What a program begins with that has one thread, or two.
BEGIN = {
    "copies": "",
    "fresh": "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n",
}


def run(how: str, code: str) -> str:
    """What a program prints that starts worker processes of one kind or the other."""
    begin = (
        BEGIN[how] + "import os, signal, sys\nfrom puna.data import workers\nfrom puna.data.workers import Workers\n"
    )
    program = begin + f"assert workers.can_be_copied() is {how == 'copies'}\n" + textwrap.dedent(code)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-"], input=program, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", BEGIN)
def test_results_are_those_of_one_process(how: str) -> None:
    code = """
        for count in (2, 3, 40):
            with Workers(abs, count) as pool:
                print(sorted(pool.map(range(-20, 0))) == list(range(1, 21)), len(pool._processes))
        with Workers(abs, 3) as pool:
            print(list(pool.map([])))
    """
    assert run(how, code).split() == ["True", "2", "True", "3", "True", "20", "[]"]


@pytest.mark.parametrize("how", BEGIN)
def test_errors_and_deaths_come_to_who_started_them(how: str) -> None:
    code = """
        for work, items in ((int, ["1", "x"]), (os._exit, [3, 3])):
            try:
                with Workers(work, 2) as pool:
                    list(pool.map(items))
            except Exception as error:
                print(type(error).__name__, error, *getattr(error, "__notes__", []), sep=", ")
    """
    value, *_, puna = run(how, code).splitlines()
    assert value == "ValueError, invalid literal for int() with base 10: 'x', in a worker process:"
    assert puna.startswith("PunaError, a worker process ended unexpectedly (exit code 3; ")
    assert puna.endswith("with fewer workers if it happens again")


@pytest.mark.parametrize("how", BEGIN)
def test_they_hold_no_file_of_who_started_them_and_hear_no_signal_with_it(how: str) -> None:
    """The lock of a folder is free once its process has ended, however that ended; Ctrl-C is that one's to hear."""
    code = """
        held = open("/dev/full", "wb")
        signal.signal(signal.SIGTERM, lambda *_: print("heard"))
        with Workers(os.path.realpath, 2) as pool:
            print("/dev/full" in pool.map(f"/proc/self/fd/{number}" for number in range(held.fileno() + 9)))
        with Workers(os.getpgid, 2) as pool:
            print(os.getpgid(0) in pool.map([0, 0]))
        with Workers(signal.getsignal, 2) as pool:
            print({signal.SIG_DFL} == set(pool.map([signal.SIGTERM] * 2)))
    """
    assert run(how, code).split() == ["False", "False", "True"]


def test_work_that_cannot_travel_is_done_by_copies() -> None:
    code = """
        with Workers(lambda item: item + 1, 2) as pool:
            print(sorted(pool.map([1, 2, 3])))
        print("once")
    """
    assert run("copies", code) == "[2, 3, 4]\nonce\n"


def test_a_process_with_threads_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/task").is_dir():
        assert not can_be_copied()
        return
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert not can_be_copied()
    done.set()
    thread.join()
