"""Kinds of corpora: each file of this folder is one, found because it is there, and has

    HELP                              one line for the command line
    OPTIONS                           the options that it takes: those below, and its own
    DISTINCT                          whether only the first of several spans with the same bytes is taken; documents
                                      are then held out by their ids, else by what they say
    spans(source, options)            what there is to read, in a fixed order: `Span` or `LeftOut`
    read(span, data, options)         the documents in the bytes of one span: `Document` or `LeftOut`

where `options` maps the name of every option to its value. Nothing here imports anything heavy: the command line reads
HELP and OPTIONS of all kinds to build its own help.
"""

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from puna.data.documents import Document, LeftOut, Span
from puna.errors import UsageError


@dataclass(frozen=True)
class Option:
    """One setting of a kind.

    Attributes:
        name: in Python; the command line puts dashes for underscores.
        type: of its value.
        default: the value where none is given; None: the kind finds one.
        help: one line.
        least: smallest value of a whole number; None: any.
    """

    name: str
    type: type
    default: Any
    help: str
    least: int | None = None


class Corpus(Protocol):
    """What every module of this folder is."""

    HELP: str
    OPTIONS: tuple[Option, ...]
    DISTINCT: bool

    def spans(self, source: Path, options: Mapping[str, Any]) -> Iterator[Span | LeftOut]:
        """What there is to read in one source."""

    def read(self, span: Span, data: bytes, options: Mapping[str, Any]) -> Iterator[Document | LeftOut]:
        """The documents in the bytes of one span."""


HELD_OUT = Option("held_out", float, 0.0, "Share of documents kept from training, in DIR/held_out; copies go together.")

#: What every kind of plain text takes.
TEXT_OPTIONS = (
    Option("fim_rate", float, 0.0, "Share of documents cut for infilling; Code Llama's training cuts 0.9."),
    Option("spm_rate", float, 0.5, "Share of these that are laid out suffix first."),
    Option("fim_tokens", int, 4096, "Longer documents are not cut; give the tokens of a row in training.", 2),
    HELD_OUT,
    Option("near_duplicates", bool, False, "Leave out near-duplicates too (needs datasketch)."),
    Option("seed", int, 0, "Of the infilling cuts."),
)


def kinds() -> list[str]:
    """The names of all kinds."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@functools.cache  # asked for every document
def find(kind: str) -> Corpus:
    """The kind of this name.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in kinds():
        raise UsageError(f"there is no kind of corpus {kind!r}; there are {', '.join(kinds())}")
    return cast(Corpus, importlib.import_module(f"{__name__}.{kind}"))


def checked_options(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a kind with its value.

    Raises:
        UsageError: the kind has no such option, or its value is of another type or not a share.
    """
    options = {option.name: option for option in find(kind).OPTIONS}
    if unknown := sorted(given.keys() - options.keys()):
        raise UsageError(f"{kind} takes no option {', '.join(unknown)}; it takes {', '.join(sorted(options))}")
    values: dict[str, Any] = {}
    for name, option in options.items():
        values[name] = value = given[name] if given.get(name) is not None else option.default
        if value is None:
            continue
        found = type(value)
        if found is not option.type and not (option.type is float and found is int):
            raise UsageError(f"{name} must be {option.type.__name__}, not {value!r}")
        if option.type is float and not 0 <= value <= 1:
            raise UsageError(f"{name} is a share, between 0 and 1, not {value!r}")
        if option.least is not None and value < option.least:
            raise UsageError(f"{name} is {value}; it must be {option.least} or more")
    return values
