"""`puna quantize`: a model with weights of few bits, and what that costs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli import app
from puna.cli._shared import AsJson, Device, Model
from puna.errors import UsageError

#: Name of a score -> how it is printed.
SCORES = {"perplexity": "perplexity", "exact_match": "next line, exact", "edit_similarity": "next line, similarity"}


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.")],
    scheme: Annotated[str, typer.Option(help="int8, int4 or fp8 (for devices that multiply such numbers).")] = "int8",
    group_size: Annotated[
        int | None, typer.Option(help="int4: weights that share a scale: 32, 64 or 128.  [64]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Score before and after on this: prepared, a folder of code, or a text file.")
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="With --data: how many lines are asked for.")] = 32,
    max_documents: Annotated[int, typer.Option(min=1, help="With --data: most documents that are read.")] = 32,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Write a model with weights of few bits.

    It loads like any other; keep the original to train or convert it.
    """
    from puna.checkpoint import quantize

    if data is not None:
        _check(data)
    options: dict[str, Any] = {"corpus": data, "cases": cases, "max_documents": max_documents, "device": device}
    made = quantize(model, output, scheme=scheme, group_size=group_size)
    result = made if data is None else made | {"before": _scores(model, options), "after": _scores(output, options)}
    if as_json:
        print(json.dumps(result))
        return
    print(f"{'':24}{'before':>12}{made['scheme']:>12}")
    print(f"{'MB':24}{made['size_bytes_before'] / 1e6:12,.1f}{made['size_bytes'] / 1e6:12,.1f}")
    if data is not None:
        for name, title in SCORES.items():
            print(f"{title:24}{result['before'][name]:12.4f}{result['after'][name]:12.4f}")
    print(output)


def _check(data: Path) -> None:
    """Refuses what cannot be scored on before time is spent on quantising."""
    from puna.evaluate.corpus import read_documents

    if not data.exists():
        raise UsageError(f"there is no {data} to score on")
    read_documents(data)


def _scores(model: str | Path, options: dict[str, Any]) -> dict[str, float]:
    from puna.evaluate import evaluate

    result = evaluate("completion", model, **options)
    bits_per_token = result["bits_per_byte"] * result["bytes"] / result["tokens"]
    return {"perplexity": 2**bits_per_token} | {name: result[name] for name in SCORES if name in result}
