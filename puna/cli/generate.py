"""`puna generate`: continues texts; many, from a file into another, go on where a run before was killed."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli import _shared as shared
from puna.cli import app
from puna.errors import PunaError, UsageError
from puna.files import check_file, file_aside, is_device, mark_of
from puna.log import Log, open_log
from puna.progress import Progress, say

if TYPE_CHECKING:
    from puna.generate import Completion, OnText
    from puna.model.llama import Llama
    from puna.tokenizer import Tokenizer


@app.command()
def generate(
    context: typer.Context,
    model: shared.Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts; -: standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help='JSON lines with "prompt"; other fields are kept.')] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help='JSON lines with "completion" to write; killed, the same command goes on.'),
    ] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Leave out what cannot be completed.")] = False,
    n: Annotated[int, typer.Option(min=1, help="Completions of each prompt, with seeds one apart.")] = 1,
    max_tokens: shared.MaxTokens = 128,
    temperature: shared.Temperature = 0.0,
    top_k: shared.TopK = 0,
    top_p: shared.TopP = 1.0,
    min_p: shared.MinP = 0.0,
    repetition_penalty: shared.RepetitionPenalty = 1.0,
    stop: shared.Stop = None,
    presence_penalty: Annotated[float, typer.Option(help="Taken from logits of what was written already.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for every time that it was written.")] = 0.0,
    stop_ids: Annotated[list[int] | None, typer.Option("--stop-id", help="End at this token; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind EOS and EOT.")] = False,
    seed: shared.Seed = 0,
    batch_rows: Annotated[
        int | None, typer.Option(min=1, help="Most completions that run at a time; default: as memory allows.")
    ] = None,
    lookup: Annotated[
        bool, typer.Option("--lookup", help="Guess what repeats and check it: the same text, sooner.")
    ] = False,
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A small model of the same vocabulary that guesses instead.")
    ] = None,
    healing: Annotated[
        bool, typer.Option("--healing", help="Split the end of a prompt anew: a word may go on as one token.")
    ] = False,
    cache_dtype: shared.CacheDtype = None,
    context_tokens: shared.ContextTokens = None,
    nproc: shared.Nproc = None,
    dtype: shared.Dtype = None,
    device: shared.Device = None,
    as_json: shared.AsJson = False,
) -> None:
    """Continue texts; one alone is printed while it grows."""
    shared.leave_to_processes(context, nproc)
    is_first = os.environ.get("RANK", "0") == "0"
    asked_for = _records(prompts or [], file, keep_going=keep_going) if is_first else {}
    if is_first and output is not None:
        check_file(output)
        _check_unwritten(output)
    from puna.generate import Sampling
    from puna.generate.engine.drafts import check_one_source
    from puna.parallel.collectives import of_first_rank

    settings = shared.checked_settings(context)
    Sampling.of(settings).several(n)
    check_one_source(lookup=lookup, draft=draft)
    with shared.processes(device):
        loaded, tokenizer = shared.open_model(model, dtype, device, context_tokens)
        longest = loaded.config.max_position_embeddings
        fitting = of_first_rank(_those_that_fit(asked_for, tokenizer, longest, keep_going=keep_going))
        records = list(fitting.values())
        guesser = None if draft is None else shared.open_draft(draft, tokenizer, dtype, device, context_tokens)
        started, total = time.monotonic(), n * len(records)
        on_text = shared.print_piece if is_first and not as_json and output is None and total == 1 else None
        options: dict[str, Any] = {"n": n, "healing": healing, **settings}
        options |= {"lookup": lookup, "draft": guesser, "cache_dtype": cache_dtype}
        if batch_rows is not None:
            options["batch_rows"] = batch_rows
        weights = mark_of(file for suffix in ("safetensors", "bin") for file in Path(model).glob(f"*.{suffix}"))
        asked = [model, weights, dtype, cache_dtype, n, healing, settings, records]
        asked += [] if context_tokens is None else [context_tokens]
        with results_in(output if is_first else None, asked) as results:
            if len(results):
                say(f"continuing {output}: {len(results)} of {total} are there")
            _complete_missing(loaded, tokenizer, fitting, results, on_text, options, keep_going=keep_going)
    if not is_first:
        return  # the first process speaks for all
    summary = {
        "model": model,
        "completion_tokens": sum(result["completion_tokens"] for result in results),
        "seconds": round(time.monotonic() - started, 3),
    }
    if as_json:
        print(json.dumps(summary | ({"completions": list(results)} if output is None else {"output": str(output)})))
    elif output is not None:
        print(output)
    elif total == 1:
        print()
    else:
        for number, result in enumerate(there := list(results), 1):
            print(f"=== {number}/{len(there)}: {_last_line(result['prompt'])} ({result['finish']})")
            print(result["completion"])


def _complete_missing(
    model: "Llama",
    tokenizer: "Tokenizer",
    asked_for: dict[str, dict[str, Any]],
    results: "Results",
    on_text: "OnText | None",
    options: dict[str, Any],
    *,
    keep_going: bool,
) -> None:
    """Completes what is missing of the results, but for prompts that may outgrow the cache."""
    from puna.generate.engine.scheduler import OutgrowsCache
    from puna.parallel.collectives import of_first_rank

    n, places, total = options["n"], list(asked_for), options["n"] * len(asked_for)
    records = enumerate(asked_for.values())
    missing = {number: record for number, record in records if not results.has(range(number * n, number * n + n))}
    missing = of_first_rank(missing)  # it alone knows what was there before
    while missing:
        try:
            return _complete(model, tokenizer, missing, total, results, on_text, options)
        except OutgrowsCache as error:  # none has been begun
            numbers = list(missing)
            reasons = {numbers[index // n]: reason for index, reason in error.reasons.items()}
        for number, reason in reasons.items():
            _leave_out(PunaError(f"{places[number]} {reason}"), keep_going=keep_going)
            del missing[number]
            total -= n
    if total == 0:
        raise PunaError("no prompt leaves room for a completion in the cache")


def _complete(
    model: "Llama",
    tokenizer: "Tokenizer",
    missing: dict[int, dict[str, Any]],
    total: int,
    results: "Results",
    on_text: "OnText | None",
    options: dict[str, Any],
) -> None:
    """Completes records, by their numbers; a text that is all there is goes to `on_text`, several move a bar."""
    from puna.generate import generate as complete_texts

    n, numbers = options["n"], list(missing)
    texts = [record["prompt"] for record in missing.values()]

    def keep(index: int, completion: "Completion") -> None:
        number, sample = numbers[index // n], index % n
        results.put(number * n + sample, missing[number] | shared.as_record(completion))

    if total == 1:
        complete_texts(model, tokenizer, texts, on_text=on_text, on_completion=keep, **options)
        return
    with Progress("completing", total, "completions") as progress:
        progress.advance(total - n * len(missing))

        def note(index: int, completion: "Completion") -> None:
            keep(index, completion)
            progress.advance()

        complete_texts(model, tokenizer, texts, on_completion=note, **options)


class Results:
    """Completions by their numbers, as they come, in any order; those of a log are there already."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._found: dict[int, dict[str, Any]] = dict(log.lines)

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (result for _, result in sorted(self._found.items()))

    def has(self, numbers: range) -> bool:
        """Whether all of these are there."""
        return all(number in self._found for number in numbers)

    def put(self, number: int, result: dict[str, Any]) -> None:
        """Keeps one."""
        self._found[number] = result
        self._log.append([number, result])


@contextlib.contextmanager
def results_in(output: Path | None, asked: Any) -> Iterator[Results]:
    """Results that are written to a file, in the order of their numbers, once the block has ended without an error.

    Args:
        output: of JSON lines; until then each result is kept in a file beside it, where a run that was killed finds it,
            unless the output is a device. None: nothing is written.
        asked: what the results depend on.

    Raises:
        PunaError: there are results of something else that was asked, or another process writes there, or has written.
    """
    partial = None
    if output is not None and not is_device(output):
        partial = output.with_name(output.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
    head = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()
    with open_log(partial, head=head, name=output) as log:
        if output is not None:
            _check_unwritten(output)  # by a run that ended while the model was loaded
        yield (results := Results(log))
        if output is not None:
            with file_aside(output, "w") as lines:
                lines.writelines(_line(result) for result in results)
        if partial is not None:
            partial.unlink(missing_ok=True)  # without locks, another run may have ended here


def _check_unwritten(output: Path) -> None:
    if output.is_file() and output.stat().st_size:
        raise PunaError(f"{output} exists already; choose another place or remove it first")


def _line(content: Any) -> str:
    line = json.dumps(content, ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace").decode()  # JSON can spell half of a surrogate pair, UTF-8 cannot


def _records(prompts: list[str], file: Path | None, *, keep_going: bool) -> dict[str, dict[str, Any]]:
    """Where a prompt stands, for messages -> the prompt and what came with it."""
    if bool(prompts) == (file is not None):
        raise UsageError('give prompts as arguments, or --file with JSON lines, or "-" for standard input')
    if file is None:
        texts = [shared.read_text(Path("-")) if prompt == "-" else prompt for prompt in prompts]
        for number, text in enumerate(texts, 1):
            _check_prompt(text, f"prompt {number}")
        return {f"prompt {number}": {"prompt": text} for number, text in enumerate(texts, 1)}
    records = {}
    for number, line in enumerate(shared.content_of(file).split(b"\n"), 1):
        place = f"{file}:{number}"
        try:
            if (text := shared.decoded(line, place)).strip():
                records[place] = _record(text, place)
        except PunaError as error:
            _leave_out(error, keep_going=keep_going)
    if not records:
        raise PunaError(f"{file} holds no prompts")
    return records


def _those_that_fit(
    records: dict[str, dict[str, Any]], tokenizer: "Tokenizer", context: int, *, keep_going: bool
) -> dict[str, dict[str, Any]]:
    """The prompts that leave room for a completion in a context of so many tokens."""
    fitting = {}
    for place, record in records.items():
        length = len(tokenizer.encode(record["prompt"], bos=True))
        if length < context:
            fitting[place] = record
        else:
            error = PunaError(
                f"{place} has {length} tokens and the model's context {context}; shorten it, or raise --context"
            )
            _leave_out(error, keep_going=keep_going)
    if records and not fitting:
        raise PunaError(f"no prompt leaves room for a completion in the model's context of {context} tokens")
    return fitting


def _leave_out(error: PunaError, *, keep_going: bool) -> None:
    if not keep_going:
        raise PunaError(f"{error}; mend it, or leave it out with --keep-going") from None
    say(f"left out: {error}")


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PunaError(f"{where} is not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise PunaError(f'{where} is not an object with a text "prompt"')
    if taken := record.keys() & set(shared.RESULT_FIELDS):
        names = ", ".join(sorted(taken))
        raise PunaError(f"{where} has {names} already, which the result would replace; call it something else")
    _check_prompt(record["prompt"], f"the prompt of {where}")
    return record


def _check_prompt(text: str, where: str) -> None:
    if not text:
        raise PunaError(f"{where} is empty, so there is nothing to continue")
    half = next((place for place, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        raise PunaError(f"{where} is not UTF-8 text (character {half} is half of a surrogate pair)")


def _last_line(prompt: str) -> str:
    last = prompt.rstrip().rpartition("\n")[2]
    return repr(last if len(last) <= 60 else "…" + last[-59:])
