"""What runs inside the sandboxes: `hold` keeps the untrusted program, `test` puts the trusted questions to it.

The two run in sandboxes of their own and share nothing but a pair of pipes. `test` calls the program's function by
sending the arguments, and gets an answer that is rebuilt here, strictly, as plain builtin data; so the program can
neither reach the test's memory, nor answer with an object that equals everything, nor say "passed":

    test                                       hold
    [program, "add"]            ──────────▶    executes the program
                                ◀──────────    ["ready"]
    [(2, 3), {}]                ──────────▶    add(2, 3)
                                ◀──────────    ["answer", 5, []]
    assert candidate(2, 3) == 5

The file is run on its own, without site-packages, and imports next to nothing: starting is most of a judgement's time.
"""

from __future__ import annotations

import os
import resource
import sys
from functools import partial

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

#: Longest message between the two halves, in bytes.
MESSAGE_BYTES = 4 << 20

#: How deep lists, tuples, sets and dicts may lie within each other.
DEPTH = 100

#: What `test` reports when the other half went away; the judge looks at its exit status and says why.
GONE = "the program ended without answering"

#: What `test` reports when the other half never started.
NOT_STARTED = "the sandbox of the program did not start"

#: Arguments that a function may change in place; the change is carried over.
MUTABLE = (list, dict, set, bytearray)


def main(role: str, *numbers: str) -> None:
    """Sets the limits that the last numbers give, for this process and its children, then plays `role`."""
    *descriptors, cpu_seconds, memory_bytes, processes, file_bytes = [int(number) for number in numbers]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    if role == "hold":
        _limit_cpu(cpu_seconds)
        hold(Pipe(*descriptors))
    else:
        serve_tests(descriptors[0], cpu_seconds)


def _limit_cpu(seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


# ---- the untrusted half


def hold(pipe: Pipe) -> None:
    """Executes the program that comes first, then does for every question that follows what it asks."""
    pipe.send(encode(["hello"]))
    program, entry_point = decode(pipe.receive())
    module = sys.modules["candidate"] = type(sys)("candidate")
    try:
        _seed_random(program)
        exec(compile(program, "<program>", "exec"), module.__dict__)
        function = module.__dict__[entry_point]
    except BaseException as error:
        pipe.send(_raised(error))
        return
    pipe.send(encode(["ready"]))
    made: list[Any] = []  # the objects of which the test holds handles
    while True:
        match decode(pipe.receive()):
            case ["call", arguments, keywords]:
                pipe.send(_answer(function, _with_objects(arguments, made), _with_objects(keywords, made)))
            case ["make", name, arguments, keywords]:
                given = _with_objects(arguments, made), _with_objects(keywords, made)
                pipe.send(_handle(partial(_new, module.__dict__, name, *given), made))
            case ["get", Handle(number), name]:
                pipe.send(_handle(partial(getattr, made[number], name), made))
            case ["set", Handle(number), name, value]:
                pipe.send(_answer(setattr, (made[number], name, _with_objects(value, made)), {}))


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


def _seed_random(source: str) -> None:
    """Makes what `source` draws the same in every judgement, at no cost where it draws nothing."""
    if "random" in source:
        import random

        random.seed(0)


# ---- the trusted half


def serve_tests(channel_number: int, cpu_seconds: int) -> None:
    """Runs one test after another, each in a process forked for it, which spares the start of an interpreter.

    A byte with four file descriptors (task, inbox, outbox, verdict) starts a test; its exit code, in four characters,
    is sent back when it has ended.
    """
    import copy  # noqa: F401  what tests commonly import is imported once
    import math  # noqa: F401
    import random  # noqa: F401
    import socket
    import string  # noqa: F401
    import typing  # noqa: F401

    channel = socket.socket(fileno=channel_number)
    channel.sendall(b"   0")
    while True:
        _, (task, inbox, outbox, verdict), _, _ = socket.recv_fds(channel, 1, 4)
        child = os.fork()
        if child == 0:
            channel.close()
            _limit_cpu(cpu_seconds)
            test(_read(task, None), Pipe(inbox, outbox), verdict)
        for descriptor in (task, inbox, outbox, verdict):
            os.close(descriptor)
        channel.sendall(b"%4d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test(task: bytes, pipe: Pipe, verdicts: int) -> NoReturn:
    """Runs one test and writes one line, `verdict<TAB>detail`, to the descriptor `verdicts`; what it says is final.

    The verdict is "passed", "wrong" (the test refused an answer), "error" (the program failed to give one), "memory",
    "output" (an answer beyond `MESSAGE_BYTES`) or "sandbox" (the task's own code fails, or the sandbox does).
    """

    def report(verdict: str, detail: str = "") -> NoReturn:
        os.write(verdicts, f"{verdict}\t{detail}".encode(errors="backslashreplace")[:4000])
        os._exit(0)

    try:
        _test(task, pipe, report)
    except BaseException as error:
        report("sandbox", f"the task's own code fails: {_shown(error)}")


def _test(task: bytes, pipe: Pipe, report: Callable[..., NoReturn]) -> NoReturn:
    program, entry_point, classes, setup, questions = decode(task)
    proxy = Proxy(pipe, entry_point, report)
    namespace: dict[str, Any] = {"__name__": "test"}
    _seed_random(questions)
    exec(compile(setup, "<setup>", "exec"), namespace)
    code = compile(questions, "<test>", "exec")
    proxy.start(program)
    namespace[entry_point] = proxy.call
    for name in classes:
        namespace[name] = proxy.maker(name)
    try:
        exec(code, namespace)
    except MemoryError as error:
        report("memory", _shown(error))
    except Exception as error:
        report("error" if error is proxy.raised else "wrong", f"{_shown(error)}{_line(error, questions)}")
    report("passed")


class Proxy:
    """Stands for the program's function in the test. What cannot be data ends the test at once, past any `except`."""

    def __init__(self, pipe: Pipe, name: str, report: Callable[..., NoReturn]) -> None:
        self.pipe, self.name, self.report = pipe, name, report
        self.raised: Exception | None = None

    def start(self, program: str) -> None:
        """Has the other half execute the program."""
        if self._receive(NOT_STARTED, "sandbox") != ["hello"]:
            self.report("sandbox", NOT_STARTED)
        match self._ask([program, self.name]):
            case ["ready"]:
                return
            case ["raised", "MemoryError", str()]:
                self.report("memory", "MemoryError")
            case ["raised", str() as kind, str() as message]:
                self.report("error", f"{kind}: {message}")
        self.report("error", "the program answered out of turn")

    def call(self, *arguments: Any, **keywords: Any) -> Any:
        """Calls the function over there: gives its answer, changes the arguments it changed, raises what it raised."""
        result, changes = self._result(["call", arguments, keywords])
        if isinstance(result, Handle):
            self.report("error", "the program answered out of turn")
        for change in changes:
            self._change(arguments, change)
        return result

    def maker(self, name: str) -> Callable[..., Any]:
        """A function that makes an object of the class `name` over there, and gives an `Object` that stands for it."""

        def make(*arguments: Any, **keywords: Any) -> Any:
            return self._object(self._result(["make", name, arguments, keywords])[0])

        return make

    def get(self, handle: Handle, name: str) -> Any:
        """An attribute of an object over there."""
        return self._object(self._result(["get", handle, name])[0])

    def set(self, handle: Handle, name: str, value: Any) -> None:
        """Sets an attribute of an object over there."""
        self._result(["set", handle, name, value])

    def _object(self, value: Any) -> Any:
        return Object(self, value) if isinstance(value, Handle) else value

    def _result(self, question: list[Any]) -> tuple[Any, list[Any]]:
        try:
            asked = encode(question)
        except NotDataError as error:
            self.report("sandbox", f"the test passes {error} to {self.name}")
        match self._ask(asked):
            case ["answer", result, list() as changes]:
                return result, changes
            case ["not data", str() as what, bool() as truth]:
                return Opaque(self, f"{self.name} returned {what}", truth), []
            case ["raised", str() as kind, str() as message]:
                self.raised = _rebuilt_exception(kind, message)
                raise self.raised
        self.report("error", "the program answered out of turn")

    def _ask(self, question: Any) -> Any:
        try:
            self.pipe.send(question if isinstance(question, bytes) else encode(question))
        except OSError:
            self.report("error", GONE)
        return self._receive(GONE, "error")

    def _receive(self, otherwise: str, verdict: str) -> Any:
        try:
            return decode(self.pipe.receive())
        except EOFError:
            self.report(verdict, otherwise)
        except TooLongError:
            self.report("output", f"an answer is longer than {MESSAGE_BYTES:,} bytes")
        except NotDataError as error:
            self.report("error", f"the program's answer is not data: {error}")

    def _change(self, arguments: tuple[Any, ...], change: Any) -> None:
        match change:
            case [int() as i, new] if 0 <= i < len(arguments) and type(new) is type(arguments[i]):
                old = arguments[i]
                if isinstance(old, list | bytearray):
                    old[:] = new
                elif isinstance(old, dict | set):
                    old.clear()
                    old.update(new)
                return
        self.report("error", "the program answered out of turn")


class Handle:
    """The number of an object that stays with the program."""

    __match_args__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Opaque:
    """Stands in the test for a value that is not plain data, of which it may learn no more than whether it is true."""

    def __init__(self, proxy: Proxy, what: str, truth: bool) -> None:
        for name, value in (("_proxy", proxy), ("_what", what), ("_truth", truth)):
            object.__setattr__(self, name, value)

    def __bool__(self) -> bool:
        return self._truth

    def _refuse(self, *_: object) -> NoReturn:
        report: Callable[..., NoReturn] = self._proxy.report
        report("wrong", self._what)

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __len__ = __iter__ = __getitem__ = __contains__ = __call__ = _refuse
    __hash__ = __int__ = __float__ = __index__ = __abs__ = __add__ = __radd__ = __sub__ = __rsub__ = __str__ = (
        __repr__
    ) = _refuse

    def __getattr__(self, name: str) -> Any:
        return self._refuse()


class Object(Opaque):
    """Stands in the test for an object that it had the program make: passed on, read and set, never compared."""

    def __init__(self, proxy: Proxy, handle: Handle) -> None:
        super().__init__(proxy, "the test compares an object of the program's own", True)
        object.__setattr__(self, "_handle", handle)

    def __getattr__(self, name: str) -> Any:
        return self._proxy.get(self._handle, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._proxy.set(self._handle, name, value)


class CandidateError(Exception):
    """An exception of the program that has no plain builtin counterpart."""


def _rebuilt_exception(kind: str, message: str) -> Exception:
    import builtins

    found = getattr(builtins, kind, None)
    quiet = (StopIteration, StopAsyncIteration)  # would end a loop of the test as if all were well
    if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, quiet):
        try:
            return found(message)
        except TypeError:  # some want more than a message
            pass
    return CandidateError(f"{kind}: {message}")


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _line(error: BaseException, source: str) -> str:
    """Where in the test it went wrong."""
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<test>":
            line = f", at: {source.splitlines()[trace.tb_lineno - 1].strip()[:200]}"
        trace = trace.tb_next
    return line


# ---- data over a pipe


class NotDataError(Exception):
    """A value that cannot cross, or bytes that are no value; the message says which."""


class TooLongError(Exception):
    """A message beyond `MESSAGE_BYTES`."""


class Pipe:
    """Messages over two file descriptors, each led by its length in 8 bytes."""

    def __init__(self, inbox: int, outbox: int) -> None:
        self.inbox, self.outbox = inbox, outbox

    def send(self, message: bytes) -> None:
        """Writes one message."""
        rest = memoryview(len(message).to_bytes(8, "big") + message)
        while rest:
            rest = rest[os.write(self.outbox, rest) :]

    def receive(self) -> bytes:
        """Reads one message.

        Raises:
            EOFError: the other half is gone.
            TooLongError: the message announces more than `MESSAGE_BYTES`.
        """
        size = int.from_bytes(_read(self.inbox, 8), "big")
        if size > MESSAGE_BYTES:
            raise TooLongError
        return _read(self.inbox, size)


def _read(descriptor: int, size: int | None) -> bytes:
    """Reads `size` bytes, or all there are."""
    chunks, left = [], size
    while left is None or left > 0:
        chunk = os.read(descriptor, 1 << 16 if left is None else min(left, 1 << 16))
        if not chunk and left is None:
            break
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        left = None if left is None else left - len(chunk)
    return b"".join(chunks)


#: Letter of a container -> its type, and how it is built from a list of its items. `dict` goes as its items.
CONTAINERS: dict[bytes, tuple[type, Callable[[list[Any]], Any]]] = {
    b"l": (list, list),
    b"u": (tuple, tuple),
    b"e": (set, set),
    b"z": (frozenset, frozenset),
    b"m": (dict, dict),
    b"k": (type({}.keys()), lambda items: dict.fromkeys(items).keys()),
    b"v": (type({}.values()), lambda items: dict(enumerate(items)).values()),
    b"w": (type({}.items()), lambda items: dict(items).items()),
}

#: Letter of a plain value -> its type, its text, and how it is built from the text.
SCALARS: dict[bytes, tuple[type, Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    b"i": (int, lambda x: b"%x" % int.__index__(x), lambda text: int(text, 16)),
    b"d": (float, lambda x: float.hex(x).encode(), lambda text: float.fromhex(text.decode())),
    b"c": (complex, lambda x: f"{x.real.hex()} {x.imag.hex()}".encode(), lambda text: _complex(text.decode())),
    b"s": (str, lambda x: str.encode(x, "utf-8", "surrogatepass"), lambda text: text.decode("utf-8", "surrogatepass")),
    b"b": (bytes, bytes, bytes),
    b"a": (bytearray, bytes, bytearray),
}

#: Letter -> value, for the values there is only one of.
CONSTANTS = {b"N": None, b"T": True, b"F": False, b"E": ...}

#: Types that may themselves be passed, by their place here.
TYPES = (int, float, str, bool, list, tuple, dict, set)

#: Letter of a standard library number -> its type, and how it is spelled; built from the spelling by the type itself.
NUMBERS = {b"D": ("decimal", "Decimal"), b"Q": ("fractions", "Fraction")}


def encode(value: Any) -> bytes:
    """Plain data as bytes: a letter, a length and the text, or a letter, a count and the items.

    A subclass of a builtin type goes as the builtin, an iterator as an iterator over the items it still has.

    Raises:
        NotDataError: the value, or something in it, is not plain data; the message names its type.
    """
    out: list[bytes] = []
    _encode(value, out, DEPTH)
    return b"".join(out)


def _encode(value: Any, out: list[bytes], depth: int) -> None:
    if depth == 0:
        raise NotDataError(f"data nested deeper than {DEPTH}")
    for letter, constant in CONSTANTS.items():
        if value is constant:
            out.append(letter)
            return
    for letter, (kind, spelled, _) in SCALARS.items():
        if isinstance(value, kind):
            text = spelled(value)
            out.append(b"%b%d:%b" % (letter, len(text), text))
            return
    if isinstance(value, type) and any(value is kind for kind in TYPES):
        out.append(b"t1:%d" % TYPES.index(value))
        return
    for letter, (module, name) in NUMBERS.items():
        if type(value).__name__ == name and type(value).__module__ == module:
            text = str(value).encode()
            out.append(b"%b%d:%b" % (letter, len(text), text))
            return
    if isinstance(value, Object | Handle):
        handle = value._handle if isinstance(value, Object) else value
        text = b"%d" % handle.number
        out.append(b"h%d:%b" % (len(text), text))
        return
    items: list[Any]
    if isinstance(value, range):
        letter, items = b"r", [value.start, value.stop, value.step]
    elif hasattr(value, "__next__"):
        letter, items = b"n", list(value)
    else:
        letter = next((letter for letter, (kind, _) in CONTAINERS.items() if isinstance(value, kind)), b"")
        if not letter:
            raise NotDataError(f"a {type(value).__name__}, which is not plain data")
        items = list(dict.items(value)) if isinstance(value, dict) else list(value)
    out.append(b"%b%d:" % (letter, len(items)))
    for item in items:
        _encode(item, out, depth - 1)


def decode(message: bytes) -> Any:
    """The value that `encode` made the bytes of; its types are exactly the builtin ones.

    Raises:
        NotDataError: the bytes are not what `encode` makes.
    """
    try:
        value, end = _decode(message, 0, DEPTH)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise NotDataError(str(error)) from None
    if end != len(message):
        raise NotDataError("bytes after its end")
    return value


def _decode(message: bytes, start: int, depth: int) -> tuple[Any, int]:
    letter = message[start : start + 1]
    if letter in CONSTANTS:
        return CONSTANTS[letter], start + 1
    if depth == 0:
        raise NotDataError(f"nested deeper than {DEPTH}")
    colon = message.index(b":", start, start + 12)
    size, start = int(message[start + 1 : colon]), colon + 1
    if not 0 <= size <= len(message) - start:
        raise NotDataError("cut off")
    if letter in SCALARS or letter in NUMBERS:
        text, end = message[start : start + size], start + size
        return (SCALARS[letter][2](text) if letter in SCALARS else _number(letter, text.decode())), end
    if letter == b"t":
        return TYPES[int(message[start : start + size])], start + size
    if letter == b"h":
        return Handle(int(message[start : start + size])), start + size
    items = []
    for _ in range(size):
        item, start = _decode(message, start, depth - 1)
        items.append(item)
    if letter == b"r":
        return range(*items), start
    if letter == b"n":
        return iter(items), start
    if letter in CONTAINERS:
        return CONTAINERS[letter][1](items), start
    raise NotDataError(f"no kind of value is called {letter!r}")


def _complex(text: str) -> complex:
    real, imaginary = text.split()
    return complex(float.fromhex(real), float.fromhex(imaginary))


def _number(letter: bytes, text: str) -> Any:
    import importlib

    module, name = NUMBERS[letter]
    return getattr(importlib.import_module(module), name)(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
