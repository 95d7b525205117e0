"""Runs the commands of a program in another language, one after the other, and says how each ended.

    files {"main.cpp": …}, commands [g++ …, ./main]  ──▶  compiled? ──▶ run ──▶ b"1 0 0.02"

which says: the second command was the last, and ended with exit code 0 after 0.02 seconds of processor time.

This process waits beside the program, in its process namespace but out of its reach: it is pid 1, which no signal from
within ends, and no system call that reads or writes another process is allowed.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}


def run(files: dict[str, str], commands: list[list[str]], words: int, report: int) -> None:
    """Writes the files, runs the commands up to the first that fails, and reports that one, or else the last.

    Args:
        files: name -> text, in `/tmp`.
        commands: absolute path of a program and its arguments.
        words: file descriptor for all that is printed.
        report: file descriptor for the number of the command, its exit code, below 0 that of a signal, and the
            processor seconds of it and all that it waited for.
    """
    for descriptor in (words, report):
        os.set_inheritable(descriptor, False)
    for name, text in files.items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    streams: list[Any] = [(os.POSIX_SPAWN_DUP2, words, 1), (os.POSIX_SPAWN_DUP2, words, 2)]
    number, code, seconds = -1, 0, 0.0
    for command in commands:
        number += 1
        child = os.posix_spawn(command[0], command, ENVIRONMENT, file_actions=streams)
        _, status, usage = os.wait4(child, 0)
        code, seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if code != 0:
            break
    os.write(report, f"{number} {code} {seconds:.3f}".encode())
