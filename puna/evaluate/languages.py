"""Languages other than Python: how a program that holds its own tests is compiled and run, and ends with a word.

A program passes when it has come to its end, so behind its tests it prints a word that nobody can guess. Its file holds
the word in two halves: a shell program whose here-document never ends prints the rest of its file, but not the word.
"""

import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from puna.errors import PunaError
from puna.evaluate.sandbox import Limits, Script

#: Compilers and virtual machines are larger and slower than a Python function.
LIMITS = Limits(
    cpu_seconds=15, wall_seconds=60, memory_mib=1024, processes=64, file_mib=32, tmp_mib=128, output_kib=256
)


@dataclass(frozen=True)
class Language:
    """How to run one.

    Attributes:
        file: name of the program's file.
        commands: each a tool and its arguments.
        package: Debian's name of what holds the tools.
        ending: a program and a word -> the program that prints the word, of which it holds halves, behind its tests.
        signs: texts in the output that say that a test failed.
    """

    file: str
    commands: tuple[tuple[str, ...], ...]
    package: str
    ending: Callable[[str, str], str]
    signs: tuple[str, ...]


def _behind(line: str) -> Callable[[str, str], str]:
    return lambda program, word: f"{program}\n{_in_halves(line, word)}\n"


def _before_brace(line: str, braces: int) -> Callable[[str, str], str]:
    """Before the last brace, which closes `main`, or the one before, where a class is closed by the last."""

    def ending(program: str, word: str) -> str:
        at = len(program)
        for _ in range(braces):
            at = max(0, program.rfind("}", 0, at))
        return f"{program[:at]}\n{_in_halves(line, word)}\n{program[at:]}"

    return ending


def _in_halves(line: str, word: str) -> str:
    half = len(word) // 2
    return line.replace("HALF", word[:half], 1).replace("HALF", word[half:], 1)


def _cpp(program: str, word: str) -> str:
    return "#include <cstdio>\n" + _before_brace('std::puts("HALF" "HALF");', 1)(program, word)


#: Language, as MultiPL-E calls it -> how to run it.
LANGUAGES = {
    "cpp": Language(
        file="main.cpp",
        commands=(("g++", "-std=c++17", "-o", "main", "main.cpp"), ("/tmp/main",)),
        package="g++",
        ending=_cpp,
        signs=("Assertion `",),
    ),
    "js": Language(
        file="main.js",
        commands=(("node", "main.js"),),
        package="nodejs",
        ending=_behind("console.log('HALF' + 'HALF')"),
        signs=("AssertionError", "Assertion failed"),
    ),
    "sh": Language(
        file="main.sh",
        commands=(("bash", "main.sh"),),
        package="bash",
        ending=_behind('echo HALF""HALF'),
        signs=(),
    ),
    "java": Language(
        file="Problem.java",
        commands=(("javac", "-encoding", "UTF8", "Problem.java"), ("java", "-ea", "-cp", "/tmp", "Problem")),
        package="default-jdk-headless",
        ending=_before_brace('System.out.println("HALF" + "HALF");', 2),
        signs=("AssertionError",),
    ),
    "php": Language(
        file="main.php",
        commands=(("php", "main.php"),),
        package="php-cli",
        ending=_behind('echo "HALF" . "HALF\\n";'),
        signs=("Exception: Test failed",),
    ),
}


def script(language: str, program: str) -> Script:
    """A program with its tests, as the sandbox takes it.

    Raises:
        PunaError: the language's tools are not installed; the message says in which package they are.
    """
    known = LANGUAGES[language]
    word = secrets.token_hex(16)
    return Script({known.file: known.ending(program, word)}, _found(language), word, known.signs)


def require(language: str) -> None:
    """Raises a `PunaError` if the language's tools are not installed."""
    _found(language)


def _found(language: str) -> tuple[tuple[str, ...], ...]:
    known = LANGUAGES[language]
    commands = []
    for tool, *arguments in known.commands:
        path = tool if tool.startswith("/") else shutil.which(tool, path="/usr/bin:/bin")
        if path is None:
            raise PunaError(
                f"programs in {language} need {tool}, which is not installed; on Debian and Ubuntu: "
                f"apt-get install {known.package}"
            )
        path = path if path.startswith("/tmp/") else os.path.realpath(path)
        # Java finds its libraries by /proc, which a sandbox does not have.
        ahead = ("/usr/bin/env", f"LD_LIBRARY_PATH={Path(path).parents[1] / 'lib'}") if "/jvm/" in path else ()
        commands.append((*ahead, path, *arguments))
    return tuple(commands)
