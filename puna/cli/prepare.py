"""`puna prepare KIND SRC… -o DIR`: one subcommand a kind, with the options that the kind declares."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli import Commands, app
from puna.data import corpora
from puna.errors import UsageError

kinds = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(kinds, name="prepare", help="Make token ids of code, text or dialogs, ready for training.")

#: What all kinds take: name, type with its place on the command line, default.
_COMMON: list[tuple[str, Any, Any]] = [
    ("sources", Annotated[list[Path], typer.Argument(metavar="SRC", help="Files or folders.")], ...),
    ("output", Annotated[Path, typer.Option("-o", "--output", help="The folder to make.")], ...),
    ("tokenizer", Annotated[Path, typer.Option(help="tokenizer.model, tokenizer.json or a folder with one.")], ...),
    (
        "workers",
        Annotated[int | None, typer.Option(help="Processes; if not given as many as processors, for little data one.")],
        None,
    ),
    (
        "to",
        Annotated[str | None, typer.Option(help="mindrecord: write rows for MindFormers too, DIR/train.mindrecord.")],
        None,
    ),
    (
        "sequence_length",
        Annotated[int, typer.Option(min=2, help="MindFormers' seq_length, with --to mindrecord; rows are one longer.")],
        4096,
    ),
    ("json", Annotated[bool, typer.Option("--json", help="Print dataset.json on stdout.")], False),
]


def _command(kind: str) -> Callable[..., None]:
    """A function for typer whose parameters are the kind's options."""

    def command(**arguments: Any) -> None:
        from puna.data.prepare import prepare

        as_json, to, length = (arguments.pop(name) for name in ("json", "to", "sequence_length"))
        output = arguments.pop("output")
        if to not in (None, "mindrecord"):
            raise UsageError(f"no format of rows is called {to!r}; there is mindrecord")
        info = prepare(kind, arguments.pop("sources"), output, **arguments)
        if to is not None:
            from puna.data.mindrecord import write_prepared

            write_prepared(output, output / "train.mindrecord", length)
        if as_json:
            typer.echo(json.dumps(info, ensure_ascii=False))

    own = [
        (option.name, Annotated[option.type | None, typer.Option(_flag(option), help=option.help)], option.default)
        for option in corpora.find(kind).OPTIONS
    ]
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is ... else default,
                annotation=annotation,
            )
            for name, annotation, default in [*_COMMON, *own]
        ]
    )
    command.__annotations__ = {name: annotation for name, annotation, _ in [*_COMMON, *own]}
    return command


def _flag(option: corpora.Option) -> str:
    return f"--{option.name.replace('_', '-')}"  # said once, so that switches have no --no- twin


for _kind in corpora.kinds():
    kinds.command(_kind, help=corpora.find(_kind).HELP)(_command(_kind))
