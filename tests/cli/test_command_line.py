"""The command line as a whole: help, exit codes, and errors of one or two lines without a traceback."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import puna
from puna import cli
from puna.config import recipe_names
from puna.parallel import start


def _puna(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "puna", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["frobnicate"], 2, "there is no command 'frobnicate'; there are adapt, chat, compare, convert, demo, doctor,"),
        (["prepare", "src"], 2, "there is no command 'src'; there are chat, code, jsonl, mindrecord, text, wikitext"),
        (["train"], 2, "Missing argument"),
        (["prepare", "code", ".", "-o", "x", "--tokenizer", "y", "--sequence-length", "1"], 2, "sequence-length"),
        (["train", "tiny-pretrain", "steps=9"], 2, "schedule.warmup_steps=30 is more than steps=9; use 9 or less"),
        (["train", "tiny-pretrain", "optimizer.peak_lr=.inf"], 2, "input should be a finite number"),
        (["train", "nope"], 2, "there is no recipe nope: neither a file nor one of"),
        (["train", "tiny-pretrain", "optimizer.peek_lr=1"], 2, "did you mean peak_lr?"),
        (["train", "tiny-pretrain", "data.train=nowhere"], 1, "nowhere does not exist; make it with `puna prepare`"),
        (["generate", "nowhere", "hello"], 1, "nowhere"),
        (["export", "nowhere", "-o", "x"], 1, "there is no run folder nowhere"),
        (["evaluate", "nothing", "x"], 2, "there is no benchmark 'nothing'; there are completion, humaneval"),
    ],
)
def test_an_error_is_a_message_and_an_exit_code(
    arguments: list[str], code: int, message: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = _puna(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert done.stdout == ""


def test_a_command_alone_shows_its_help_without_a_complaint() -> None:
    for words in ([], ["prepare"]):
        done = _puna(*words)
        assert done.returncode == 2
        assert done.stderr.startswith("Usage: ")
        assert "(see --help)" not in done.stderr


def test_a_process_that_is_told_to_end_leaves_nothing_half_written(tmp_path: Path) -> None:
    work = """
import signal, sys, time
from puna import __main__, cli
from puna.files import folder_aside

def run(_):
    with folder_aside(sys.argv[1]) as aside:
        print(aside, flush=True)
        time.sleep(60)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if these tests run under nohup
cli.run = run
__main__.main()
"""
    for number in (signal.SIGTERM, signal.SIGHUP):
        words = [sys.executable, "-c", work, str(tmp_path / "made")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert Path(process.stdout.readline().strip()).is_dir()
            process.send_signal(number)
        assert process.returncode == 128 + number
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["train", "tiny-pretrain", "data.train=d", "run_dir=r"], ["generate", "m", "x"]])
def test_what_other_processes_have_said_is_not_said_again(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "start_processes", lambda *_: 130)
    assert cli.run([*words, "--nproc", "2"]) == 130
    assert capsys.readouterr() == ("", "")


def test_closed_streams_are_no_error() -> None:
    words = shlex.join([sys.executable, "-m", "puna", "generate", "nowhere", "-"])
    done = subprocess.run(["sh", "-c", f"{words} <&-"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 0)
    done = subprocess.run(["sh", "-c", f"{words} 2>&- >&-"], check=False)
    assert done.returncode == 1


def test_debug_shows_the_traceback() -> None:
    done = _puna("--debug", "train", "nope")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "there is no recipe nope" in done.stderr


def test_the_version_is_the_packages() -> None:
    assert _puna("--version").stdout.strip() == puna.__version__


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            1,
            r"the disk is full (/data/x); free some space",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/x"),
            1,
            "Permission denied (/data/x); choose another",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.py/x"), 1, "(a.py/x); a part of that path is a file"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x"), 1, "the disk is full (/data/x)"),
        (OSError(errno.EIO, "Input/output error"), 1, "puna: Input/output error\n"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "puna: Too many open files; allow more open files"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_system_says_is_explained(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    cli.load_commands()
    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.delenv("PUNA_DEBUG", raising=False)
    assert cli.run(["train"]) == code
    assert message in capsys.readouterr().err


def test_every_command_has_help_and_a_summary_that_fits_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert len(listed) > 10
    for line in listed:
        assert not line.endswith("..."), line
        assert cli.run([line.split()[0], "--help"]) == 0
        assert "Usage: " in capsys.readouterr().out


def test_the_help_of_training_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "plan", "launch"):
        assert cli.run([command, "--help"]) == 0
        assert set(recipe_names()) <= set(re.findall(r"[\w-]+", capsys.readouterr().out))


def test_a_command_is_called_like_its_file() -> None:
    files = {file.stem for file in Path(cli.__file__).parent.glob("[!_]*.py")}
    assert files == set(typer.main.get_command(cli.load_commands()).commands)  # type: ignore[attr-defined]


def test_what_a_locale_cannot_spell_is_printed_all_the_same() -> None:
    program = "from puna import __main__, cli; cli.run = lambda _: print('é') or 0; __main__.main()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\\xe9\n"
