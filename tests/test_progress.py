"""Progress of long work: a bar in a terminal, lines elsewhere, and neither for what is soon done."""

import os
import pty
import subprocess
import sys
from pathlib import Path

WORK = """
import sys, threading, time
from puna.progress import Progress, say
with Progress("counting", 4, "sheep") as progress:
    for i in range(4):
        time.sleep({seconds})
        progress.advance(note=f"of colour {{i}}")
        say("baa")
assert threading.active_count() == 1
print("rich" in sys.modules)
"""


def shown_in_a_terminal(work: str) -> tuple[str, str]:
    """What a program says on a terminal, and what it prints."""
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", work], stdout=subprocess.PIPE, stderr=theirs, text=True, check=True)
    os.close(theirs)
    said = b""
    while piece := _read(ours):
        said += piece
    os.close(ours)
    return said.decode(), done.stdout.strip()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def test_long_work_has_a_bar_in_a_terminal_and_no_thread() -> None:
    said, loads_rich = shown_in_a_terminal(WORK.format(seconds=0.2))
    assert loads_rich == "True"
    assert "4/4 sheep" in said
    assert "of colour 3" in said
    assert said.count("baa") == 4


def test_what_is_soon_done_has_a_line_and_loads_no_bar() -> None:
    said, loads_rich = shown_in_a_terminal(WORK.format(seconds=0))
    assert loads_rich == "False"
    assert said.split("\r\n")[-2] == "counting: 4/4 sheep in 0 s of colour 3"


def test_elsewhere_there_are_lines(tmp_path: Path) -> None:
    with open(tmp_path / "said", "w") as file:
        subprocess.run([sys.executable, "-c", WORK.format(seconds=0)], stdout=subprocess.PIPE, stderr=file, check=True)
    assert (tmp_path / "said").read_text().splitlines() == ["baa"] * 4 + ["counting: 4/4 sheep in 0 s of colour 3"]


def test_long_work_shows_that_it_goes_on_before_any_of_it_is_done() -> None:
    work = """
import time
from puna.progress import Progress, still_at_work
still_at_work()
with Progress("counting", 4, "sheep"):
    for _ in range(8):
        time.sleep(0.1)
        still_at_work()
still_at_work()
"""
    said, _ = shown_in_a_terminal(work)
    assert "0/4 sheep" in said


def test_work_goes_on_when_nobody_hears_of_it_any_more() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", WORK.format(seconds=0)], stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert (done.returncode, done.stdout.strip()) == (0, b"False")
