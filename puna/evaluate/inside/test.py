"""The trusted half: runs a task's test, whose function under test asks the other half, and speaks the verdict.

    test                                       hold
                                ◀──────────    ["hello"], and executes the program
                                ◀──────────    ["ready"]
    ["call", (2, 3), {}]        ──────────▶    add(2, 3)
                                ◀──────────    ["answer", 5, []]
    assert candidate(2, 3) == 5

What the program sends is decoded as plain data, so none of its code runs here.
"""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache

from .data import MESSAGE_BYTES, Handle, NotDataError, Pipe, TooLongError, decode, encode
from .hold import seed_random

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any, NoReturn

    Task = tuple[str, list[str], str, str]  # entry point, classes, setup, questions

#: What is reported when the other half went away; the judge looks at its exit status and says why.
GONE = "the program ended without answering"

#: What is reported when the other half never started.
NOT_STARTED = "the sandbox of the program did not start"


def test(task: Task, pipe: Pipe, verdicts: int) -> NoReturn:
    """Runs one test and writes one line, `verdict<TAB>detail`, to the descriptor `verdicts`; what it says is final.

    The verdict is "passed", "wrong" (the test refused an answer), "error" (the program failed to give one), "memory",
    "output" (an answer beyond `MESSAGE_BYTES`), "timeout" (one that took longer than the test allows) or "sandbox" (the
    task's own code fails, or the sandbox does).
    """

    def report(verdict: str, detail: str = "") -> NoReturn:
        os.write(verdicts, f"{verdict}\t{detail}".encode(errors="backslashreplace")[:4000])
        os._exit(0)

    try:
        examine(task, pipe, report)
    except BaseException as error:
        report("sandbox", f"the task's own code fails: {_shown(error)}")


@lru_cache(maxsize=2)  # the two of one task, whose samples are mostly judged one after the other
def compiled(source: str, name: str) -> CodeType:
    """The code of one of a task's own texts, which are trusted."""
    return compile(source, name, "exec", dont_inherit=True)


def compile_ahead(task: Task) -> None:
    """Compiles a task's texts for every process made from here on; one that is no Python is `test`'s to report."""
    with contextlib.suppress(Exception):
        compiled(task[2], "<setup>")
        compiled(task[3], "<test>")


def examine(task: Task, pipe: Pipe, report: Callable[..., NoReturn]) -> NoReturn:
    """Waits until the program has been executed, asks the questions, and reports a verdict; see `test`."""
    entry_point, classes, setup, questions = task
    proxy = Proxy(pipe, entry_point, report)
    namespace: dict[str, Any] = {"__name__": "test"}
    seed_random(questions)
    exec(compiled(setup, "<setup>"), namespace)
    code = compiled(questions, "<test>")
    proxy.wait()
    namespace[entry_point] = proxy.call
    namespace["answer_within"] = proxy.answer_within
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
        self.most_seconds: float | None = None

    def wait(self) -> None:
        """Waits until the other half has executed the program."""
        if self._receive(NOT_STARTED, "sandbox") != ["hello"]:
            self.report("sandbox", NOT_STARTED)
        match self._receive(GONE, "error"):
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

    def answer_within(self, seconds: float) -> None:
        """From here on, an answer that takes longer ends the test: a timeout."""
        self.most_seconds = seconds

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
        return Object(self, value.number) if isinstance(value, Handle) else value

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

    def _ask(self, question: bytes) -> Any:
        try:
            self.pipe.send(question)
        except OSError:
            self.report("error", GONE)
        if self.most_seconds is not None and not self.pipe.is_ready(self.most_seconds):
            self.report("timeout", f"no answer after {self.most_seconds:.3g} s")
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


class Object(Opaque, Handle):
    """Stands in the test for an object that it had the program make: passed on, read and set, never compared."""

    def __init__(self, proxy: Proxy, number: int) -> None:
        Opaque.__init__(self, proxy, "the test compares an object of the program's own", True)
        object.__setattr__(self, "number", number)

    def __getattr__(self, name: str) -> Any:
        return self._proxy.get(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._proxy.set(self, name, value)


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
