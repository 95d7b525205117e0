"""`puna compare`: two results of one benchmark side by side."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli import app
from puna.cli._shared import AsJson

#: Most tasks that are named on the screen.
MOST_NAMED = 20

#: Of which less is better; of the others, more.
LESS_IS_BETTER = ("bits_per_byte", "perplexity")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="Folder of a run of puna evaluate … -o FIRST.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Folder of another one.")],
    as_json: AsJson = False,
) -> None:
    """Say whether two results differ by more than chance, and where."""
    from puna.evaluate.comparing import compare as compared

    result = compared(first, second)
    if as_json:
        print(json.dumps(result))
        return
    print(f"{'':24} {'first':>10} {'second':>10} {'difference':>12}  95 % interval")
    for name, value in result["difference"].items():
        notes = [_chance(result["intervals"][name])] if name in result["intervals"] else []
        notes += ["less is better"] if name in LESS_IS_BETTER else []
        scores = f"{result['first'][name]:>10.4f} {result['second'][name]:>10.4f} {value:>+12.4f}"
        print(f"{name:24} {scores}  {'; '.join(notes)}".rstrip())
    for name, (one, other) in result["settings"].items():
        print(f"they differ in {name}: {one} and {other}")
    for what in ("gained", "lost"):
        print(f"{what} {len(result[what])}: {_named(result[what])}" if result[what] else f"{what} none")


def _chance(interval: list[float] | None) -> str:
    if interval is None:
        return "too few files or tasks to say how sure that is"
    low, high = interval
    says = "more than chance" if low > 0 or high < 0 else "it may be chance"
    return f"{low:+.4f} to {high:+.4f}: {says}"


def _named(tasks: list[Any]) -> str:
    more = len(tasks) - MOST_NAMED
    return ", ".join(tasks[:MOST_NAMED]) + (f" and {more} more (--json has all)" if more > 0 else "")
