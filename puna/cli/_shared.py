"""What commands share: options, the model that these ask for, in one process or several, and texts in and out."""

import codecs
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli import words_of
from puna.errors import PunaError, UsageError
from puna.files import read_json
from puna.progress import say

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


#: What a completion has as a JSON object.
RESULT_FIELDS = "completion", "finish", "prompt_tokens", "completion_tokens"


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
    values = completion.text, completion.finish, completion.prompt_tokens, len(completion.tokens)
    return dict(zip(RESULT_FIELDS, values, strict=True))


def read_text(path: Path) -> str:
    """The text of a file, or of standard input for `-`.

    Raises:
        PunaError: it is missing or not UTF-8.
    """
    return decoded(content_of(path), str(path))


def content_of(path: Path) -> bytes:
    """The bytes of a file, or of standard input for `-`, without the mark that Windows begins files with.

    Raises:
        PunaError: it is missing.
    """
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except FileNotFoundError:
        raise PunaError(f"{path} does not exist") from None
    return content.removeprefix(codecs.BOM_UTF8)


def decoded(content: bytes, where: str) -> str:
    """Bytes as text.

    Raises:
        PunaError: they are not UTF-8; the message begins with `where` they are.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise PunaError(f"{where} is not UTF-8 text (byte {error.start}); convert it first, e.g. with iconv") from None
