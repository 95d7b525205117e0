"""`puna train`: runs a recipe, or continues the run that is in its folder."""

import os
import sys
from typing import Annotated

import typer

from puna.cli import app


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted fields, e.g. optimizer.peak_lr=1e-5.")] = None,
    nproc: Annotated[
        int | None, typer.Option(help="Processes to start on this machine, one a device; alone without it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last numbers as JSON.")] = False,
) -> None:
    """Train as RECIPE says; on an existing run folder, continue.

    On many machines, `puna launch` prints what starts them. A torchrun of your own that restarts processes needs
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.
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
