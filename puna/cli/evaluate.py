"""`puna evaluate`: scores a model, or samples that were made before, on a benchmark."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli import app
from puna.cli._shared import AsJson, CacheDtype, Device, Dtype, Nproc, leave_to_processes, processes
from puna.errors import UsageError
from puna.evaluate import benchmarks
from puna.progress import say

#: Parameters that mean the same for every benchmark; all others are a benchmark's own options.
OF_ALL = {"benchmark", "models", "output", "nproc", "dtype", "device", "as_json"}


@app.command()
def evaluate(
    context: typer.Context,
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help=f"One of: {', '.join(benchmarks.names())}.")],
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Folders in Hugging Face layout, or hub ids.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Instead of a model: answers, as JSON lines of OpenAI's or EvalPlus' form.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask a server with OpenAI's API; MODEL is its name for the model.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The benchmark's official file.  [in the folder PUNA_DATA]")] = None,
    variant: Annotated[str | None, typer.Option(help="Which of its files, e.g. sanitized, multi-line, cpp.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for answers, verdicts, result and report.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="greedy (pass@1), or sample (T 0.8, top-p 0.95, n 200).  [greedy]")
    ] = None,
    samples_per_task: Annotated[
        int | None, typer.Option("-n", help="Answers to each task.  [greedy: 1, sample: 200]")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Ask in this chat layout: a name, or a folder that ships one.")
    ] = None,
    order: Annotated[str | None, typer.Option(help="Of infilling prompts: psm or spm.  [psm]")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="A folder of code that the model has not seen, or a prepared one.")
    ] = None,
    cases: Annotated[int | None, typer.Option(min=1, help="How many lines or keys are asked for.  [200, 64]")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="perplexity, key_retrieval: tokens of context.")] = None,
    max_documents: Annotated[int | None, typer.Option(min=1, help="Most documents of the corpus.  [200]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn at random.  [0]")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Answers written at a time.  [64, of a server 8]")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Programs judged at a time.  [one a core]")] = None,
    nproc: Nproc = None,
    cache_dtype: CacheDtype = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score models, or their answers, on a benchmark.

    Programs that models write run in a sandbox. docs/evaluation.md says what each benchmark asks.
    """
    if nproc is not None and (not models or samples is not None or server is not None):
        raise UsageError("--nproc is for a model that computes here; leave it out")
    leave_to_processes(context, nproc)
    from puna.evaluate import check
    from puna.evaluate import evaluate as score
    from puna.evaluate.comparing import why_not

    options = {name: value for name, value in context.params.items() if name not in OF_ALL} | {"dtype": dtype}
    names = models or []
    folders = _folders(names, output)
    is_alone, results = "RANK" not in os.environ, []
    with contextlib.nullcontext() if is_alone else processes(device):
        for model, folder in zip(names, folders, strict=True) if len(names) > 1 else ():
            check(benchmark, model, output=folder, **options)
        for model, folder in zip(names or [""], folders, strict=True):
            results.append(score(benchmark, model or None, device=device, output=folder, **options))
    if not is_alone and os.environ["RANK"] != "0":
        return  # the first process speaks for all
    for result in results[1:]:
        if why := why_not(results[0], result):
            say(f"{results[0]['model']} and {result['model']} do not compare: {why}")
    if output is not None:
        from puna.report.evaluation import write_evaluation

        say(f"report: {write_evaluation(list(filter(None, folders)), output / 'report.html')}")
    if as_json:
        print(json.dumps(results[0] if len(results) == 1 else {"benchmark": benchmark, "results": results}))
    elif len(results) == 1:
        width = max(map(len, results[0]))
        for name, value in results[0].items():
            if name != "paper":
                print(f"{name:<{width}} {_shown(value)}")
        _print_paper(results[0])
    else:
        _print_table(results)


def _folders(models: Sequence[str], output: Path | None) -> list[Path | None]:
    """Where results go, a model each; a folder inside `output` where there are several."""
    if len(models) < 2 or output is None:
        return [output] * max(1, len(models))
    folders: dict[Path, str] = {}
    for model in models:
        parts = [part for part in Path(model).parts if part not in ("/", "..")] or [Path(model).resolve().name]
        folder = output / "_".join(parts)
        if folder in folders:
            raise UsageError(f"{folders[folder]} and {model} would both go to {folder}; score them one by one")
        folders[folder] = model
    return list(folders)


def _print_paper(result: dict[str, Any]) -> None:
    from puna.evaluate.paper import paper_name

    own = paper_name(result.get("model", ""))
    for model, figures in result.get("paper", {}).items():
        if own is None or model == own:
            print(f"paper, {model:<12} {_shown(figures)}")


def _print_table(results: list[dict[str, Any]]) -> None:
    """One line a model, one column a score; where the paper has the model, its figure in brackets."""
    from puna.evaluate.paper import paper_name

    scores = [name for name, value in results[0].items() if isinstance(value, float)]
    width = max(len(result["model"]) for result in results)
    print(" " * width, *(f"{name:>18}" for name in scores))
    for result in results:
        figures = result.get("paper", {}).get(paper_name(result["model"]), {})
        cells = [f"{result[name]:.4f}" + (f" ({figures[name]:.3f})" if name in figures else "") for name in scores]
        print(f"{result['model']:<{width}}", *(f"{cell:>18}" for cell in cells))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return " to ".join(map(_shown, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)
