"""Commands, as typer has them, that take plain words as they are.

typer has pydantic check every word of a command line, which takes longer to load than NumPy. A text, a path or a number
needs no such check; words that are not plain, such as `--workers=many`, are still left to typer, which says what is
wrong with them. Paths are not looked at: the work says what is wrong with one.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import typer
from typer.core import TyperCommand, TyperGroup


class Commands(typer.Typer):
    """typer's, but for the above."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"cls": _Group, **options})

    def command(self, *names: Any, **options: Any) -> Any:
        """As typer's."""
        return super().command(*names, **{"cls": _Command, **options})


class _Plain:
    """What groups and commands have in common."""

    def get_params(self, context: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(context)  # type: ignore[misc]
        for parameter in parameters:
            ask_typer = getattr(parameter, "get_runtime_param", None)  # older ones of typer do without pydantic
            if ask_typer is not None and not isinstance(ask_typer, partial):
                parameter.get_runtime_param = partial(_Words, parameter.type_descriptor, ask_typer)
        return parameters


class _Command(_Plain, TyperCommand):
    pass


class _Group(_Plain, TyperGroup):
    pass


class _Words(NamedTuple):
    """What a parameter makes of its words.

    Attributes:
        parameter: its type and limits, as typer describes them.
        ask_typer: gives what typer would take instead.
    """

    parameter: Any
    ask_typer: Callable[[], Any]

    def coerce(self, value: Any, *, param: Any, ctx: Any) -> Any:
        type = self.parameter.annotation
        try:
            if value is None:
                return () if param.multiple or param.nargs < 0 else None
            if isinstance(value, list | tuple):
                return [self._plain(word, *get_args(type)) for word in value]
            return self._plain(value, type)
        except ValueError:
            return self.ask_typer().coerce(value, param=param, ctx=ctx)

    def _plain(self, word: Any, type: Any) -> Any:
        if isinstance(word, type):  # texts, and defaults
            return word
        if type is Path and isinstance(word, str):
            return Path(word)
        least, most = self.parameter.parameter_info.min, self.parameter.parameter_info.max
        if type in (int, float) and isinstance(word, str) and _NUMBER.fullmatch(word):
            number = type(word)
            if (least is None or number >= least) and (most is None or number <= most):
                return number
        raise ValueError(f"{word!r} is not plain")


_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
