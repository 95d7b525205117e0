"""`puna infill`: writes what is missing between two texts, as an editor does at the cursor."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from puna.cli import _shared as shared
from puna.cli import app
from puna.errors import UsageError
from puna.progress import say

#: Marks the gap in a file.
FILL = "<FILL>"


@app.command()
def infill(
    context: typer.Context,
    model: shared.Model,
    prefix: Annotated[str | None, typer.Option(help="Text before the gap.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Text behind the gap.")] = None,
    file: Annotated[
        Path | None, typer.Option(help=f"Instead of both: a text with {FILL} in it; -: standard input.")
    ] = None,
    order: Annotated[str, typer.Option(help="psm (prefix first) or spm (suffix first).")] = "psm",
    healing: Annotated[
        bool, typer.Option(help="In spm order, split the end of the prefix anew: a word may go on as one token.")
    ] = True,
    budget: Annotated[
        int | None,
        typer.Option(help="Most tokens of the prompt: lines far from the gap are left out; default: the context's."),
    ] = None,
    max_tokens: shared.MaxTokens = 128,
    temperature: shared.Temperature = 0.0,
    top_k: shared.TopK = 0,
    top_p: shared.TopP = 1.0,
    min_p: shared.MinP = 0.0,
    repetition_penalty: shared.RepetitionPenalty = 1.0,
    stop: shared.Stop = None,
    seed: shared.Seed = 0,
    cache_dtype: shared.CacheDtype = None,
    context_tokens: shared.ContextTokens = None,
    nproc: shared.Nproc = None,
    dtype: shared.Dtype = None,
    device: shared.Device = None,
    as_json: shared.AsJson = False,
) -> None:
    """Fill the gap between two texts, printed while it grows."""
    shared.leave_to_processes(context, nproc)
    is_first = os.environ.get("RANK", "0") == "0"
    before, behind = _around(prefix, suffix, file) if is_first else ("", "")
    from puna.generate import infill as fill
    from puna.generate import prompt_room
    from puna.parallel.collectives import of_first_rank
    from puna.prompts import check_order

    settings = shared.checked_settings(context)
    check_order(order)
    with shared.processes(device):
        before, behind = of_first_rank((before, behind))
        loaded, tokenizer = shared.open_model(model, dtype, device, context_tokens)
        most = prompt_room(loaded, max_tokens) if budget is None else budget

        def tell(kept_before: str, kept_behind: str) -> None:
            say(
                f"more than {most} tokens: the model sees the last {len(kept_before)} of {len(before)} characters "
                f"before the gap, and the first {len(kept_behind)} of {len(behind)} behind it"
            )

        completion = fill(
            loaded,
            tokenizer,
            before,
            behind,
            budget=most,
            healing=healing,
            order=order,  # type: ignore[arg-type]  # it is checked above
            cache_dtype=cache_dtype,
            on_text=shared.print_piece if is_first and not as_json else None,
            on_cut=tell,
            **settings,
        )
    if not is_first:
        return  # the first process speaks for all
    if as_json:
        print(json.dumps({"model": model, "prefix": before, "suffix": behind} | shared.as_record(completion)))
    else:
        print()


def _around(prefix: str | None, suffix: str | None, file: Path | None) -> tuple[str, str]:
    is_given = prefix is not None or suffix is not None
    if is_given == (file is not None):
        raise UsageError(f"give --prefix and --suffix (one may be left out), or --file with a text that holds {FILL}")
    if file is None:
        return prefix or "", suffix or ""
    parts = shared.read_text(file).split(FILL)
    if len(parts) != 2:
        raise UsageError(f"{file} holds {FILL} {len(parts) - 1} times; mark the one gap with it")
    return parts[0], parts[1]
