"""`puna convert`: other systems' checkpoints to the Hugging Face layout, and back."""

import json
from pathlib import Path
from typing import Annotated

import typer

from puna.cli import app


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder or file of a checkpoint; its format is seen from its files.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.")],
    to: Annotated[str, typer.Option(help="hf (Hugging Face), meta (consolidated.00.pth) or mindspore (.ckpt).")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="Round to fp32, bf16 or fp16; default: as stored.")] = None,
    rope_theta: Annotated[
        float | None, typer.Option(help="Rotary base, where the source does not state one (Code Llama: 1e6).")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Shape of a .ckpt's model: MindFormers' YAML, a config.json, or a name (codellama-34b)."),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Strategy files of MindSpore's slices; default: SRC/strategy, SRC/../strategy.")
    ] = None,
    pick: Annotated[
        str | None,
        typer.Option(help="Pattern of the .ckpt to take of several, e.g. '*-2_8.ckpt'; default: the latest."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Write slices for MindSpore: dp=1,mp=8,pp=2[,optimizer=1], or strategy files to cut by."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Turn a checkpoint into another format.

    It goes tensor by tensor, in little memory; a name or shape that does not fit is an error.
    """
    from puna.checkpoint import convert

    options = {"config": config, "strategy": strategy, "pick": pick, "layout": layout}
    folder = convert(source, output, to=to, dtype=dtype, rope_theta=rope_theta, **options)
    print(json.dumps({"folder": str(folder)}) if as_json else folder)
