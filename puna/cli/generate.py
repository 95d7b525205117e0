"""`puna generate`: continues texts; and the options that it shares with `puna infill` and `puna chat`."""

import codecs
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli import app, words_of
from puna.errors import PunaError, UsageError
from puna.files import check_file, file_aside, is_device, mark_of, read_json
from puna.log import Log, open_log
from puna.progress import Progress, say

if TYPE_CHECKING:
    from puna.generate import Completion, OnText
    from puna.model.llama import Llama
    from puna.tokenizer import Tokenizer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder in Hugging Face layout, or a hub id.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of a completion.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Only the likeliest tokens that together reach this probability.")]
MinP = Annotated[float, typer.Option(help="Only tokens at least this fraction as likely as the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated; newline: $'\\n'.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers, where the temperature is above 0.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: as stored, or bf16 where quantised.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, npu …; default: an accelerator if there is one.")]
CacheDtype = Annotated[
    str | None,
    typer.Option(help="int8 or fp8: room for twice the tokens, by slightly other logits; default: the model's."),
]
ContextTokens = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=2,
        help="Tokens that the model may see; default: config.json's. Code Llama reads 100000 where that says 16384.",
    ),
]
Nproc = Annotated[
    int | None, typer.Option(help="Processes to start on this machine, one a device; they share the model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

#: Options that are fields of `puna.generate.Sampling`; a command has some of them.
SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "stop", "stop_ids", "ignore_eos", "seed",
)  # fmt: skip


@app.command()
def generate(
    context: typer.Context,
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts; -: standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help='JSON lines with "prompt"; their other fields are kept.')] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help='JSON lines with "completion" to write; killed, the same command goes on.'),
    ] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Leave out what cannot be completed.")] = False,
    n: Annotated[int, typer.Option(min=1, help="Completions of each prompt, with seeds one apart.")] = 1,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    presence_penalty: Annotated[float, typer.Option(help="Taken from logits of what was written already.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for every time that it was written.")] = 0.0,
    stop_ids: Annotated[list[int] | None, typer.Option("--stop-id", help="End at this token; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind EOS and EOT.")] = False,
    seed: Seed = 0,
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
    cache_dtype: CacheDtype = None,
    context_tokens: ContextTokens = None,
    nproc: Nproc = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue texts; one alone is printed while it grows."""
    leave_to_processes(context, nproc)
    is_first = os.environ.get("RANK", "0") == "0"
    asked_for = _records(prompts or [], file, keep_going=keep_going) if is_first else {}
    if is_first and output is not None:
        check_file(output)
        if output.is_file() and output.stat().st_size:
            raise PunaError(f"{output} exists already; choose another place or remove it first")
    from puna.generate.engine.drafts import check_one_source
    from puna.parallel.collectives import of_first_rank

    settings = checked_settings(context)
    check_one_source(lookup=lookup, draft=draft)
    with processes(device):
        loaded, tokenizer = open_model(model, dtype, device, context_tokens)
        longest = loaded.config.max_position_embeddings
        fitting = of_first_rank(_those_that_fit(asked_for, tokenizer, longest, keep_going=keep_going))
        records = list(fitting.values())
        guesser = None if draft is None else open_draft(draft, tokenizer, dtype, device, context_tokens)
        started, total = time.monotonic(), n * len(records)
        on_text = print_piece if is_first and not as_json and output is None and total == 1 else None
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
        results.put(number * n + sample, missing[number] | as_record(completion))

    if total == 1:
        complete_texts(model, tokenizer, texts, on_text=on_text, on_completion=keep, **options)
        return
    with Progress("completing", total, "completions") as progress:
        progress.advance(total - n * len(missing))

        def note(index: int, completion: "Completion") -> None:
            keep(index, completion)
            progress.advance()

        complete_texts(model, tokenizer, texts, on_completion=note, **options)


def checked_settings(context: typer.Context) -> dict[str, Any]:
    """The fields of `puna.generate.Sampling` among a command's options.

    Raises:
        UsageError: one of them is wrong, or `cache_dtype` is: said before a large model is loaded.
    """
    from puna.devices import pick_device
    from puna.generate import Sampling
    from puna.generate.engine.storage import storage_dtype

    given = context.params
    settings = {name: given[name] for name in SAMPLING if name in given}
    settings |= {name: tuple(settings[name] or ()) for name in ("stop", "stop_ids") if name in settings}
    Sampling.of(settings)
    storage_dtype(given["cache_dtype"], pick_device(given["device"]))
    return settings


def leave_to_processes(context: typer.Context, nproc: int | None) -> None:
    """Starts a command in several processes and ends with their exit code; None: it goes on in this one."""
    if nproc is not None:
        from puna.parallel.start import start_processes

        for model in context.params.get("models") or [context.params["model"]]:
            _check_share(model, nproc)
        sys.exit(start_processes(words_of(context, without="nproc"), nproc))


def _check_share(model: str, nproc: int) -> None:
    """Refuses so many processes, before they start, as cannot share a model that is here."""
    from puna.model.config import ModelConfig
    from puna.model.split import split_misfit

    path = Path(model) / "config.json"
    if nproc > 1 and path.is_file():
        config = ModelConfig.from_json(read_json(path), str(path))
        if reason := split_misfit(config, nproc, "--nproc"):
            raise UsageError(reason)


@contextlib.contextmanager
def processes(device: str | None) -> Iterator[None]:
    """While open, this process is one of those that were started together, if it was; the first speaks for all."""
    from puna.devices import pick_device
    from puna.parallel.mesh import process_group, rank_device

    with process_group(rank_device(pick_device(device))):
        yield


def open_model(name: str, dtype: str | None, device: str | None, context: int | None) -> "tuple[Llama, Tokenizer]":
    """Loads a model that comes with its tokenizer; of several `processes`, each loads its share.

    Raises:
        PunaError: it cannot be loaded, or has no tokenizer.
    """
    import torch
    import torch.distributed as dist

    from puna.checkpoint import load, resolve
    from puna.devices import device_name, has_fast_bf16, pick_device
    from puna.parallel.inference import Share
    from puna.parallel.mesh import rank_device
    from puna.quantized import QuantizedLinear

    folder, place = resolve(name), rank_device(pick_device(device))
    share = Share if dist.is_initialized() else None
    model, tokenizer = load(folder, dtype=dtype, device=place, share=share, for_inference=True, context=context)
    if tokenizer is None:
        raise PunaError(f"{folder} has no tokenizer; copy the model's tokenizer.model or tokenizer.json there")
    dtype_in_use = model.compute_dtype or model.lm_head.weight.dtype
    is_slow = dtype_in_use.itemsize == 2 if place.type == "cpu" else dtype_in_use == torch.bfloat16
    is_quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())  # fp32 is no faster then
    if is_slow and not is_quantized and not has_fast_bf16(place):
        kind, faster = ("16-bit numbers", "fp32") if place.type == "cpu" else ("bf16", "fp16")
        say(f"{device_name(place)} has no units for {kind}; --dtype {faster} is many times faster")
    return model, tokenizer


def open_draft(
    name: str, tokenizer: "Tokenizer", dtype: str | None, device: str | None, context: int | None
) -> "Llama":
    """Loads a small model that guesses for a large one; of several processes, each loads the whole of it.

    Raises:
        UsageError: its ids stand for other pieces than those of `tokenizer`, the large one's.
    """
    from puna.checkpoint import load, resolve
    from puna.devices import pick_device
    from puna.parallel.mesh import rank_device

    place = rank_device(pick_device(device))
    draft, its = load(resolve(name), dtype=dtype, device=place, for_inference=True, context=context)
    shared = range(0 if its is None else min(its.vocab_size, tokenizer.vocab_size))
    if its is not None and any(its.piece(id) != tokenizer.piece(id) for id in shared):
        raise UsageError(f"{name} splits texts into other tokens than the model; a draft shares the model's vocabulary")
    return draft


def print_piece(_: int, text: str) -> None:
    """Prints a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def as_record(completion: "Completion") -> dict[str, Any]:
    """A completion as fields of a JSON object."""
    return {
        "completion": completion.text,
        "finish": completion.finish,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.tokens),
    }


def read_text(path: Path) -> str:
    """The text of a file, or of standard input for `-`.

    Raises:
        PunaError: it is missing or not UTF-8.
    """
    return _decoded(_content(path), str(path))


def _content(path: Path) -> bytes:
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except FileNotFoundError:
        raise PunaError(f"{path} does not exist") from None
    return content.removeprefix(codecs.BOM_UTF8)  # Windows begins files with a mark


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise PunaError(f"{where} is not UTF-8 text (byte {error.start}); convert it first, e.g. with iconv") from None


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
        PunaError: there are results of something else that was asked, or another process writes there.
    """
    partial = None
    if output is not None and not is_device(output):
        partial = output.with_name(output.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
    head = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()
    with open_log(partial, head=head, name=output) as log:
        yield (results := Results(log))
        if output is not None:
            with file_aside(output, "w") as lines:
                lines.writelines(_line(result) for result in results)
        if partial is not None:
            partial.unlink()


def _line(content: Any) -> str:
    line = json.dumps(content, ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace").decode()  # JSON can spell half of a surrogate pair, UTF-8 cannot


def _records(prompts: list[str], file: Path | None, *, keep_going: bool) -> dict[str, dict[str, Any]]:
    """Where a prompt stands, for messages -> the prompt and what came with it."""
    if bool(prompts) == (file is not None):
        raise UsageError('give prompts as arguments, or --file with JSON lines, or "-" for standard input')
    if file is None:
        texts = [read_text(Path("-")) if prompt == "-" else prompt for prompt in prompts]
        for number, text in enumerate(texts, 1):
            _check_prompt(text, f"prompt {number}")
        return {f"prompt {number}": {"prompt": text} for number, text in enumerate(texts, 1)}
    records = {}
    for number, line in enumerate(_content(file).split(b"\n"), 1):
        place = f"{file}:{number}"
        try:
            if (text := _decoded(line, place)).strip():
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
    except (json.JSONDecodeError, RecursionError) as error:
        raise PunaError(f"{where} is not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise PunaError(f'{where} is not an object with a text "prompt"')
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
