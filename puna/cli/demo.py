"""`puna demo`: the whole story, small, on this machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from puna.cli import app


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train, tune and score a small model, in minutes, on a CPU.

    It learns from Python's standard library; a page of HTML shows every stage.
    """
    from puna.demo import demo as tell
    from puna.files import read_json

    report = tell(output)
    print(json.dumps(read_json(report.with_name("results.json"))) if as_json else report)
