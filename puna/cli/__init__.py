"""The command line: one file a command, called like it, found because it is there.

Each module of this folder but `_shared` adds its command to `app`, declares the arguments and imports what does the
work inside the function, so that `puna --help` loads neither torch nor numpy; `puna prepare …` loads `prepare.py`
alone. `run` turns errors into messages and exit codes: 0 success, 1 an error of the work, 2 wrong usage, 130
interrupted.
"""

import errno
import importlib
import os
import pkgutil
import time
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from puna import __version__
from puna.errors import DISK_IS_FULL, PunaError, UsageError
from puna.progress import complain, say


class Commands(TyperGroup):
    """Commands in the order of the alphabet; a wrong one is answered with those that there are."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names."""
        return sorted(super().list_commands(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named first, with the words behind it."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UsageError(f"there is no command {args[0]!r}; there are {', '.join(self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="puna",
    cls=Commands,
    help="Your team's own code model: prepare, train, export, generate, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if debug:
        os.environ["PUNA_DEBUG"] = "1"


def words_of(context: typer.Context, *, without: str) -> list[str]:
    """What follows `puna` in a command line that asks for the same, but for one parameter.

    Args:
        context: of the command.
        without: name of the parameter to leave out.
    """
    options: list[str] = []
    arguments: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name == without or value is None or (value is False and not parameter.secondary_opts):
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if parameter.param_type_name == "argument":
            arguments += map(str, values)
        else:
            name = parameter.secondary_opts[0] if value is False else parameter.opts[0]  # --no-healing, --healing
            equals = "=" if name.startswith("--") else ""  # -n3
            options += [name if isinstance(each, bool) else f"{name}{equals}{each}" for each in values]
    return [str(context.info_name), *options, "--", *arguments]


def load_commands(name: str = "") -> typer.Typer:
    """Adds to `app` the command of this name, or all where there is none.

    Returns:
        `app`.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")
    for module in [name] if name in names else names:
        importlib.import_module(f"puna.cli.{module}")
    return app


def run(arguments: list[str]) -> int:
    """Runs one command line.

    Args:
        arguments: what follows `puna`.

    Returns:
        The exit code.
    """
    load_commands(*arguments[:1])
    try:
        code = app(arguments, standalone_mode=False) or 0
    except Exception as error:
        if os.environ.get("PUNA_DEBUG"):
            raise
        return _explained(error)
    except SystemExit as left:  # other processes did the work, and have said how it went
        return int(left.code or 0)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:  # typer itself makes this of Ctrl-C, without a word
        say("puna: interrupted; what was finished is kept")
    return code


_INTERRUPTED = 130

#: What the system says -> what helps.
_WAYS_OUT = {
    errno.EACCES: "; choose another place, or have its owner give you the right to it",
    errno.EROFS: "; choose another place",
    errno.EEXIST: "; it is no folder: choose another place, or remove it",
    errno.ENOTDIR: "; a part of that path is a file: choose another place",
    errno.EISDIR: "; name a file",
    errno.ENAMETOOLONG: "; choose a shorter name",
    errno.EMFILE: "; allow more open files: ulimit -n 65536",
}

#: How long a rank leaves it to the first one of its machine to say what is wrong with the request.
_FIRST_SECONDS = 10.0


def _explained(error: Exception) -> int:
    is_said: bool | None = getattr(error, "is_said", None)  # by the machine's first rank; None: they have not met yet
    if is_said:
        return error.exit_code if isinstance(error, PunaError) else 1
    rank_here = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    if isinstance(error, UsageError) and is_said is None and rank_here != "0":
        time.sleep(_FIRST_SECONDS)  # the first rank here makes the same of a wrong request, and then all are stopped
    if isinstance(error, PunaError):
        complain(f"puna: {error}")
        return error.exit_code
    if hasattr(error, "format_message"):  # click's own: a wrong option or argument
        message = error.format_message()
        complain(message if message.startswith("Usage: ") else f"puna: {message} (see --help)")
        return 2
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        complain(f"puna: the disk is full{_at(error)}; free some space and run the same command again to continue")
        return 1
    if isinstance(error, OSError) and error.strerror is not None:
        complain(f"puna: {error.strerror}{_at(error)}{_WAYS_OUT.get(error.errno or 0, '')}")
        return 1
    raise error


def _at(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""
