"""The untrusted half: executes a program, then calls its function for every question that comes.

Whatever the program does to this process, its builtins or these functions, reaches no further than the bytes that it
sends, and `data.decode` on the other side takes those for nothing but data.
"""

from __future__ import annotations

import sys
from functools import partial

from .data import Handle, NotDataError, Pipe, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Arguments that a function may change in place; the change is carried over.
MUTABLE = (list, dict, set, bytearray)


def hold(program: str, entry_point: str, pipe: Pipe) -> None:
    """Executes the program, then does for every question that comes what it asks."""
    pipe.send(encode(["hello"]))
    module = sys.modules["candidate"] = type(sys)("candidate")
    try:
        seed_random(program)
        # Not with this file's own future, in which no annotation need be defined.
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
        function = module.__dict__[entry_point]
    except BaseException as error:
        pipe.send(_raised(error))
        return
    pipe.send(encode(["ready"]))
    made: list[Any] = []  # the objects of which the test holds handles
    while True:
        match decode(pipe.receive()):
            case ["call", arguments, keywords]:
                _send(pipe, _answer(function, _with_objects(arguments, made), _with_objects(keywords, made)))
            case ["make", name, arguments, keywords]:
                given = _with_objects(arguments, made), _with_objects(keywords, made)
                _send(pipe, _handle(partial(_new, module.__dict__, name, *given), made))
            case ["get", Handle(number), name]:
                _send(pipe, _handle(partial(getattr, made[number], name), made))
            case ["set", Handle(number), name, value]:
                _send(pipe, _answer(setattr, (made[number], name, _with_objects(value, made)), {}))


def _send(pipe: Pipe, answer: bytes) -> None:
    """Sends an answer; what the program has printed goes before it."""
    try:  # noqa: SIM105  no more of Python than need be: the program may have changed any of it
        sys.stdout.flush()
    except BaseException:  # whatever the program has made of it
        pass
    pipe.send(answer)


def _new(names: dict[str, Any], name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return names[name](*arguments, **keywords)


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bytes:
    try:
        before = [encode(argument) if isinstance(argument, MUTABLE) else None for argument in arguments]
    except NotDataError:  # objects of the program's own: the test reads them through their handles
        before = [None] * len(arguments)
    try:
        result = function(*arguments, **keywords)
        changed = [[i, arguments[i]] for i, old in enumerate(before) if old is not None and encode(arguments[i]) != old]
        return encode(["answer", result, changed])
    except NotDataError as error:
        return _not_data(result, str(error))
    except BaseException as error:
        return _raised(error)


def _not_data(result: Any, what: str) -> bytes:
    try:
        return encode(["not data", what, bool(result)])
    except BaseException as error:
        return _raised(error)


def _handle(make: Callable[[], Any], made: list[Any]) -> bytes:
    """What `make` gives: as data if it is data, else kept here and answered by its number."""
    try:
        value = make()
        try:
            return encode(["answer", value, []])
        except NotDataError:
            made.append(value)
            return encode(["answer", Handle(len(made) - 1), []])
    except BaseException as error:
        return _raised(error)


def _with_objects(value: Any, made: list[Any]) -> Any:
    """Arguments in which each handle is the object again; where there are none, they are what they were."""
    if not made:
        return value
    if isinstance(value, Handle):
        return made[value.number]
    if isinstance(value, list):
        for i, item in enumerate(value):
            value[i] = _with_objects(item, made)
    elif isinstance(value, tuple):
        return tuple(_with_objects(item, made) for item in value)
    elif isinstance(value, dict):
        for key, item in value.items():
            value[key] = _with_objects(item, made)
    return value


def _raised(error: BaseException) -> bytes:
    try:
        message = str(error)[:1000]
    except BaseException:
        message = ""
    return encode(["raised", type(error).__name__, message])


def seed_random(source: str) -> None:
    """Makes what `source` draws the same in every judgement, at no cost where it draws nothing."""
    if "random" in source:
        import random

        random.seed(0)
