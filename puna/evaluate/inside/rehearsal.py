"""A judgement played before the first one, so that what the interpreter builds on the way is built once, for all.

A process that is made starts with what the waiting one has: caches of types and methods, code that the interpreter has
specialized. What it has to build itself costs it time, and every page that it writes to becomes a copy of its own.
"""

from __future__ import annotations

import contextlib
import os
import sys

from .data import Pipe, encode
from .hold import hold
from .test import examine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

#: So many calls, after which the interpreter has specialized whatever code it will.
TIMES = 32

PROGRAM = """
from typing import Dict, List, Optional, Tuple
class A:
    def f(self, xs: List[int], y: Optional[str] = None) -> Tuple[int, ...]:
        try:
            return tuple(sorted({x * x for x in xs if x}))
        except ValueError as error:
            raise KeyError(f"{y}: {error}") from None
def f(*values):
    return [*A().f([3, 1]), *values]
"""
VALUES = (True, 2, -1.5, "text", None, [1, [2]], {"a": 1})
TEST = f"""
for i in range({TIMES}):
    assert f(*{VALUES}) == [1, 9, *{VALUES}], "wrong"
"""


def rehearse() -> None:
    """Plays both halves of a judgement, each against the other's words written down beforehand."""
    answer = ["answer", [1, 9, *VALUES], []]
    with _hearing(*[["call", VALUES, {}]] * TIMES) as pipe, contextlib.suppress(EOFError):
        hold(PROGRAM, "f", pipe)
    with _hearing(["hello"], ["ready"], *[answer] * TIMES) as pipe:
        try:
            examine(("f", [], "", TEST), pipe, _speak)
        except _SpokenError as spoken:
            if spoken.args != ("passed",):
                raise
    del sys.modules["candidate"]


class _SpokenError(Exception):
    """The verdict of the rehearsal."""


def _speak(*verdict: str) -> NoReturn:
    raise _SpokenError(*verdict)


@contextlib.contextmanager
def _hearing(*messages: list[Any]) -> Iterator[Pipe]:
    """A pipe on which these come in, and then nothing; what is sent goes nowhere."""
    inbox, outbox = os.pipe()
    for message in messages:
        Pipe(-1, outbox).send(encode(message))
    os.close(outbox)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    yield Pipe(inbox, nowhere)
    os.close(inbox)
    os.close(nowhere)
