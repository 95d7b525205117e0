"""`puna chat`: a conversation in the terminal, or with lines from standard input.

It runs in one process: Ctrl-C would reach several that share a model at different tokens of an answer.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puna.cli import _shared as shared
from puna.cli import app
from puna.errors import PunaError
from puna.progress import say

if TYPE_CHECKING:
    from puna.prompts import ChatTemplate, Message
    from puna.tokenizer import Tokenizer

#: A line that begins another dialog.
NEW = "/new"


@app.command()
def chat(
    context: typer.Context,
    model: shared.Model,
    template: Annotated[
        str | None, typer.Option(help="Chat template; default: the model's own, else Code Llama's.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first message.")] = None,
    max_tokens: shared.MaxTokens = 1024,
    temperature: shared.Temperature = 0.2,
    top_k: shared.TopK = 0,
    top_p: shared.TopP = 0.95,
    min_p: shared.MinP = 0.0,
    repetition_penalty: shared.RepetitionPenalty = 1.0,
    stop: shared.Stop = None,
    seed: shared.Seed = 0,
    cache_dtype: shared.CacheDtype = None,
    context_tokens: shared.ContextTokens = None,
    dtype: shared.Dtype = None,
    device: shared.Device = None,
) -> None:
    """Talk with a model.

    Each line is a message; /new forgets the dialog, Ctrl-C stops an answer, Ctrl-D leaves.
    """
    from puna.checkpoint import resolve
    from puna.generate import Engine
    from puna.generate import chat as answer

    settings = shared.checked_settings(context)
    loaded, tokenizer = shared.open_model(model, dtype, device, context_tokens)
    layout = _template(template, resolve(model), tokenizer)
    engine = Engine(loaded, tokenizer, max_rows=1, cache_dtype=cache_dtype)
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    say(f"chat template: {layout.name}; {NEW} begins another dialog, Ctrl-D leaves")
    for line in _lines():
        if line.strip() == NEW:
            messages = list(start)
            continue
        messages = _room_for({"role": "user", "content": line}, messages, start, layout, tokenizer)
        spoken, limit = _Spoken(), None
        try:
            completion = answer(loaded, tokenizer, messages, template=layout, on_text=spoken, engine=engine, **settings)
            if completion.finish == "length":
                is_cut = len(completion.tokens) == max_tokens
                limit = f"--max-tokens {max_tokens}" if is_cut else "the model's context, which is full"
        except KeyboardInterrupt:  # the answer ends here; what was said stays
            if not sys.stdin.isatty():
                raise
        except PunaError as error:
            if not sys.stdin.isatty():
                raise
            say(f"puna: {error}; {NEW} begins another dialog")
        print()
        if limit is not None:
            say(f"the answer was cut off by {limit}")
        if spoken.text.strip():
            messages.append({"role": "assistant", "content": spoken.text.strip()})
        else:
            messages.pop()  # no layout has room for a message without an answer


class _Spoken:
    """Prints an answer while it grows, without the blanks before it, and keeps it."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, index: int, piece: str) -> None:
        piece = piece if self.text else piece.lstrip()
        self.text += piece
        shared.print_piece(index, piece)


def _lines() -> Iterator[str]:
    """What the user says, until Ctrl-D or, with nothing being answered, Ctrl-C."""
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise PunaError(f"line {number} is not UTF-8 text; convert it first, e.g. with iconv") from None
            if text.strip():
                yield text
        return
    import readline  # noqa: F401 - gives `input` its line editing and history

    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip():
            yield line


def _room_for(
    question: "Message",
    messages: "list[Message]",
    start: "list[Message]",
    layout: "ChatTemplate",
    tokenizer: "Tokenizer",
) -> "list[Message]":
    """The dialog with a question behind it; begun anew if the layout takes the question, but not behind the others."""
    longer, anew = [*messages, question], [*start, question]
    if not _is_laid_out(longer, layout, tokenizer) and _is_laid_out(anew, layout, tokenizer):
        say("the chat template has no place for what was said before; the dialog begins anew")
        return anew
    return longer


def _is_laid_out(messages: "list[Message]", layout: "ChatTemplate", tokenizer: "Tokenizer") -> bool:
    from puna.prompts import UnusableDialog

    try:
        layout.encode(tokenizer, messages)
    except UnusableDialog:
        return False
    return True


def _template(name: str | None, folder: Path, tokenizer: "Tokenizer") -> "ChatTemplate":
    """The layout asked for, else the one that the model ships, else Code Llama's."""
    from puna.prompts import chat_template, ships_template

    if name is not None:
        return chat_template(name)
    if ships_template(folder):
        return chat_template(folder)
    return chat_template("codellama" if tokenizer.step_id is None else "codellama-70b")
