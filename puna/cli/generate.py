"""`puna generate`: continues texts; and the options that it shares with `puna infill` and `puna chat`."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli import app
from puna.errors import PunaError, UsageError
from puna.files import file_aside
from puna.progress import Progress, say

if TYPE_CHECKING:
    from puna.generate import Completion
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
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: as stored.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, npu …; default: an accelerator if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts; -: standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help='JSON lines with "prompt"; their other fields are kept.')] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help='JSON lines with "completion" to write.')
    ] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    stop_id: Annotated[list[int] | None, typer.Option(help="End at this token; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind EOS and EOT.")] = False,
    seed: Seed = 0,
    batch_rows: Annotated[int, typer.Option(min=1, help="Prompts completed together.")] = 16,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue texts; one alone is printed while it grows."""
    records = _records(prompts or [], file)
    from puna.generate import Sampling
    from puna.generate import generate as complete_texts

    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop or ()),
        "stop_ids": tuple(stop_id or ()),
        "ignore_eos": ignore_eos,
        "seed": seed,
    }
    Sampling.of(settings)  # a wrong setting is said before a large model is loaded
    loaded, tokenizer = open_model(model, dtype, device)
    texts = [record["prompt"] for record in records]
    started = time.monotonic()
    if len(records) == 1:
        on_text = None if as_json or output else print_piece
        completions = complete_texts(loaded, tokenizer, texts, on_text=on_text, **settings)
    else:
        with Progress("completing", len(records), "prompts") as progress:
            completions = complete_texts(
                loaded,
                tokenizer,
                texts,
                on_completion=lambda *_: progress.advance(),
                batch_rows=batch_rows,
                **settings,
            )
    summary = {
        "model": model,
        "completion_tokens": sum(len(completion.tokens) for completion in completions),
        "seconds": round(time.monotonic() - started, 3),
    }
    results = [record | as_record(completion) for record, completion in zip(records, completions, strict=True)]
    if output is not None:
        with file_aside(output, "w") as lines:
            lines.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    if as_json:
        print(json.dumps(summary | ({"completions": results} if output is None else {"output": str(output)})))
    elif output is not None:
        print(output)
    elif len(results) == 1:
        print()
    else:
        for number, result in enumerate(results, 1):
            print(f"=== {number}/{len(results)}: {_last_line(result['prompt'])} ({result['finish']})")
            print(result["completion"])


def open_model(name: str, dtype: str | None, device: str | None) -> "tuple[Llama, Tokenizer]":
    """Loads a model that comes with its tokenizer.

    Raises:
        PunaError: it cannot be loaded, or has no tokenizer.
    """
    from puna.checkpoint import load, resolve
    from puna.devices import has_fast_bf16, pick_device

    folder, place = resolve(name), pick_device(device)
    model, tokenizer = load(folder, dtype=dtype, device=place)
    if tokenizer is None:
        raise PunaError(f"{folder} has no tokenizer; copy the model's tokenizer.model or tokenizer.json there")
    dtype_in_use = model.compute_dtype or model.lm_head.weight.dtype
    if dtype_in_use.itemsize == 2 and not has_fast_bf16(place):
        say("this CPU has no units for 16-bit numbers; --dtype fp32 is many times faster, in twice the memory")
    return model, tokenizer


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
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return content.decode("utf-8")
    except FileNotFoundError:
        raise PunaError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise PunaError(f"{path} is not UTF-8 text (byte {error.start}); convert it first, e.g. with iconv") from None


def _records(prompts: list[str], file: Path | None) -> list[dict[str, Any]]:
    if bool(prompts) == (file is not None):
        raise UsageError('give prompts as arguments, or --file with JSON lines, or "-" for standard input')
    if file is None:
        return [{"prompt": read_text(Path("-")) if prompt == "-" else prompt} for prompt in prompts]
    lines = [(number, line) for number, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
    if not lines:
        raise PunaError(f"{file} holds no prompts")
    return [_record(line, f"{file}:{number}") for number, line in lines]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PunaError(f"{where} is not JSON ({error.msg})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise PunaError(f'{where} is not an object with a text "prompt"')
    return record


def _last_line(prompt: str) -> str:
    last = prompt.rstrip().rpartition("\n")[2]
    return repr(last if len(last) <= 60 else "…" + last[-59:])
