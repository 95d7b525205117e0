"""`puna export`: a training run's weights as a folder in Hugging Face layout."""

import json
from pathlib import Path
from typing import Annotated

import typer

from puna.cli import app


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Round to fp32, bf16 or fp16; default: as the run holds them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a run's weights as a Hugging Face folder.

    transformers, vLLM and llama.cpp's converter open it as it is.
    """
    from puna.checkpoint import export

    folder = export(run_dir, output, step=step, dtype=dtype)
    print(json.dumps({"folder": str(folder)}) if as_json else folder)
