"""Words of a command line are taken as typer takes them, and plain ones without pydantic."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.core import TyperCommand

from puna.cli._words import Commands, _Command

WORDS = ["", "7", "-3", "007", "0.5", "7.0", "1e-5", ".5", "5.", "inf", "many", " 7 ", "1_000", "٣", "a b", "1,5"]


def values_of(words: list[str], cls: type[TyperCommand]) -> Any:
    """What a command is called with, or how typer refuses its words."""
    app, called = Commands(add_completion=False), []

    @app.command(cls=cls)
    def command(
        paths: Annotated[list[Path], typer.Argument()],
        text: Annotated[str, typer.Option()] = "a",
        path: Annotated[Path | None, typer.Option()] = None,
        number: Annotated[int | None, typer.Option()] = None,
        few: Annotated[int, typer.Option(min=0, max=9)] = 3,
        share: Annotated[float, typer.Option()] = 0,
        small: Annotated[float | None, typer.Option(min=0.001)] = None,
        many: Annotated[list[int] | None, typer.Option()] = None,
        flag: Annotated[bool, typer.Option("--flag")] = False,
    ) -> None:
        called.append([(value, type(value)) for value in (paths, text, path, number, few, share, small, many, flag)])

    try:
        app(words, standalone_mode=False)
    except Exception as error:
        return type(error), str(error)
    return called


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("option", ["", "--text", "--path", "--number", "--few", "--share", "--small", "--many"])
def test_words_are_taken_as_typer_takes_them(option: str, word: str) -> None:
    words = ["x", f"{option}={word}"] if option else ["x", "--flag", "--many=1", "--many=2", "--", word]
    assert values_of(words, _Command) == values_of(words, TyperCommand)


def test_a_command_of_plain_words_runs_without_pydantic(tmp_path: Path) -> None:
    words = ["prepare", "chat", "nowhere", "-o", "x", "--tokenizer", "y", "--workers=2", "--held-out=0.1"]
    code = f"import sys, puna.cli; print(puna.cli.run({words}), 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
    assert "y" in done.stderr
