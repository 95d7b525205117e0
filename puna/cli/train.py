"""`puna train`: runs a recipe, or continues the run that is in its folder."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from puna.cli import app

#: Not `puna.config.recipe_names`, whose imports take longer than the help.
_RECIPES = "\n".join(sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")))

Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",  # a line each, or their names would be broken at hyphens
        help=f"One of\n\n\b\n{_RECIPES}\n\nor a YAML file with the fields of puna/config.py.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE", help="Of the recipe, e.g. optimizer.peak_lr=1e-5."),
]


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(help="Processes to start on this machine, one a device; alone without it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last numbers as JSON.")] = False,
) -> None:
    """Train as RECIPE says; on an existing run folder, continue.

    A new run begins with the weights of start=MODEL; without it, puna's own recipes begin with random ones. --nproc is
    for one machine; for several, puna launch prints what starts them.
    """
    if nproc is not None:
        from puna.config import load_recipe
        from puna.parallel.start import start_processes

        load_recipe(recipe, overrides)  # refused before anything starts
        words = ["train", recipe, *(overrides or []), *(["--json"] if as_json else [])]
        sys.exit(start_processes(words, nproc))
    from puna.train import train as train_recipe

    result = train_recipe(recipe, overrides)
    if os.environ.get("RANK", "0") != "0":
        return  # the first process speaks for all
    if as_json:
        from puna.train.metrics import as_json as line_of

        print(line_of(result))
    else:
        loss = f", loss {result['loss']:.4f}" if "loss" in result else ""
        print(f"{result['run_dir']}: step {result['step']}{loss}")
