"""`puna evaluate`: scores a model, or samples that were made before, on a benchmark."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli import app
from puna.cli.generate import AsJson, Device, Dtype
from puna.evaluate import benchmarks


@app.command()
def evaluate(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help=f"One of: {', '.join(benchmarks.names())}.")],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder in Hugging Face layout, or a hub id.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="humaneval: completions instead of a model, as JSON lines.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="humaneval: HumanEval.jsonl.gz.")] = None,
    output: Annotated[Path | None, typer.Option(help="humaneval: write the model's completions, as samples.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="completion: a folder of code, or a prepared one.")] = None,
    cases: Annotated[int | None, typer.Option(min=1, help="completion: how many lines are asked for.  [200]")] = None,
    max_documents: Annotated[int | None, typer.Option(min=1, help="completion: most documents.  [200]")] = None,
    seed: Annotated[int | None, typer.Option(help="completion: of the choice of documents and lines.  [0]")] = None,
    details: Annotated[Path | None, typer.Option(help="Write every verdict or line, as JSON lines.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a completion.  [512, a line 64]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Prompts completed together.  [8, lines 16]")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="humaneval: judgements at once.  [one a core]")] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score a model on HumanEval (its code runs in a sandbox), or on files it has not seen."""
    from puna.evaluate import evaluate as score

    options = {
        "samples": samples,
        "data": data,
        "output": output,
        "corpus": corpus,
        "cases": cases,
        "max_documents": max_documents,
        "seed": seed,
        "details": details,
        "max_tokens": max_tokens,
        "batch": batch,
        "workers": workers,
    }
    result = score(benchmark, model, dtype=dtype, device=device, **options)
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<16} {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)
