"""`puna migrate`: a YAML of MindFormers becomes a recipe."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from puna.cli import app


@app.command()
def migrate(
    source: Annotated[Path, typer.Argument(metavar="YAML", help="Of MindFormers, for Llama.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RECIPE", help="Recipe to write; else printed.")
    ] = None,
    faithful: Annotated[bool, typer.Option("--faithful", help="Keep MindFormers' arithmetic, for comparison.")] = False,
    rows: Annotated[int | None, typer.Option(help="Rows of the training data, to count steps.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print recipe and keys as JSON.")] = False,
) -> None:
    """Turn a YAML of MindFormers into a recipe.

    Every key is translated, or named with the reason why not.
    """
    from puna.migrate import migrate
    from puna.progress import say

    result = migrate(source, output, faithful=faithful, rows=rows)
    if as_json:
        recipe = None if result.recipe is None else result.recipe.model_dump(mode="json", exclude_unset=True)
        keys = [asdict(key) for key in result.keys]
        print(json.dumps({"recipe": recipe, "keys": keys, "steps": result.steps, "differences": result.differences}))
        return
    for fate in dict.fromkeys(key.fate for key in result.keys):
        say(f"\n{fate}:")
        for key in result.keys:
            if key.fate == fate:
                say(f"  {key.key} = {key.value!r}: {key.why}")
    if result.differences:
        say("\ntrains otherwise" + (":" if faithful else " (--faithful keeps the old way, for comparison):"))
        for difference in result.differences:
            say(f"  {difference}")
    if result.recipe is None:
        print("\n".join(result.steps))
    elif output is None:
        print(result.to_yaml(), end="")
    else:
        print(output)
