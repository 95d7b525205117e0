"""`puna adapt`: a model further trained on a folder of code, and a page that says whether it helped."""

import json
from pathlib import Path
from typing import Annotated

import typer

from puna.cli import app
from puna.cli._shared import AsJson, Device
from puna.progress import say


@app.command()
def adapt(
    code: Annotated[Path, typer.Argument(metavar="CODE", help="Folder of code.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder in Hugging Face layout, or a hub id.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Of the recipe, e.g. optimizer.peak_lr=1e-5.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.")] = Path("adapted"),
    epochs: Annotated[float, typer.Option(min=0.01, help="How often the code is seen.")] = 2.0,
    held_out: Annotated[float, typer.Option(min=0.001, max=0.9, help="Share of the files kept for scoring.")] = 0.1,
    cases: Annotated[int, typer.Option(min=1, help="Lines that the models are asked for.")] = 200,
    humaneval: Annotated[
        Path | None, typer.Option(help="HumanEval.jsonl.gz, to see what is forgotten.  [in the folder PUNA_DATA]")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train MODEL further on CODE, and report whether it is better.

    Code is prepared, the model scored on files kept out, trained on the others, exported and scored again. Stopped, the
    same command goes on.
    """
    from puna.adapt import adapt as tell
    from puna.config import parse_overrides
    from puna.files import read_json

    report = tell(
        code,
        model,
        output,
        epochs=epochs,
        held_out=held_out,
        cases=cases,
        humaneval=humaneval,
        device=device,
        overrides=parse_overrides(overrides or []),
    )
    results = read_json(report.with_name("results.json"))
    say(results["lead"])
    print(json.dumps(results) if as_json else report)
