"""`puna convert`: other systems' checkpoints to the Hugging Face layout, and back."""

import json
from pathlib import Path
from typing import Annotated

import typer

from puna.cli import app


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of a checkpoint; its format is seen from its files.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.")],
    to: Annotated[str, typer.Option(help="hf (Hugging Face) or meta (consolidated.00.pth).")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="Round to fp32, bf16 or fp16; default: as stored.")] = None,
    rope_theta: Annotated[
        float | None, typer.Option(help="Rotary base, where the source does not state one (Code Llama: 1e6).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Turn a checkpoint into another format, tensor by tensor; a name or shape that does not fit is an error."""
    from puna.checkpoint import convert

    folder = convert(source, output, to=to, dtype=dtype, rope_theta=rope_theta)
    print(json.dumps({"folder": str(folder)}) if as_json else folder)
