"""A place where a program that nobody has read may run, and a judge that it cannot reach.

A `Job` is an untrusted program and a trusted test of one of its functions. Each half runs in a process of its own
(`inside/`): the test asks, the program answers with data, and the judge out here reads the verdict from the test alone,
so nothing that the program says, returns or exits with can be a verdict.

    judge ──starts──▶ [bubblewrap: hold ─▶ the program] ◀──questions, answers──▶ [bubblewrap: test]
      ▲                                     └── stdout, stderr: read up to a limit       │
      └──────────────────────────────────── verdict ─────────────────────────────────────┘

**What it stops.** bubblewrap gives user, mount, process, network, IPC, host name and cgroup namespaces, an ordinary uid
(where the judge is root, root is given up before bubblewrap starts, since no limit on processes holds for root), no
environment, and a read-only view of `/usr` and of the Python that runs it: no `/proc`, no `/home`. In it a process
waits that has run no program but its own rehearsal; every program gets a new process in namespaces of its own once more
(all but the network's, for which sockets are refused), with a `/tmp` of its own in memory, no capabilities, system
calls refused that no solution needs (`inside/filter.py`), and limits on processor time, wall time, memory, processes,
files and output. When a judgement ends, the program's process namespace ends, and with it every process that was
started in it; if the judge is killed, so are they. No two programs share anything that one could leave and the other
find. The program never shares a process with the test: frames, monkeypatches, `__eq__`, exit codes and printed words
reach nothing.

**What it does not stop.** A fault of the kernel or of bubblewrap: for programs written to attack a kernel, use a
virtual machine. Memory is limited per process, so all processes of a program together may use `processes` times
`memory_mib`, and System V shared memory more, until the wall time is over; a memory cgroup around puna limits the sum.
A program can slow its neighbours down, which is why a timeout is judged once more, alone. It reads the arguments of the
questions, as any function does, and it can tell time. Of a value that is not plain data (an object of an own class, a
function) the test learns whether it is true; comparing it is a wrong answer. Programs have the standard library and
nothing else.

A `Script` is a program in another language with its tests in it, as those benchmarks have them. It is kept in as
firmly, but the verdict is less safe: it must print a random word that stands behind its tests, and a program that
looks for that word in its own code could find it.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Self

from puna.devices import cpu_cores
from puna.evaluate.inside.data import encode
from puna.evaluate.inside.test import GONE, NOT_STARTED
from puna.evaluate.walls import NOBODY, unusable, walled_python

#: Verdict -> what it says of the program; kept apart, since neither a timeout nor a fault of ours is a wrong answer.
VERDICTS = {
    "passed": "every question of the test was answered as it should be",
    "wrong": "the test refused an answer",
    "error": "the program does not compile, raises, exits or dies",
    "timeout": "it used up its processor time or wall time, twice",
    "memory": "it asked for more memory than it may have",
    "output": "it printed or answered more than it may",
    "sandbox": "the sandbox or the task's own code failed; it says nothing about the program",
}

#: Longest wait for a sandbox to start.
START_SECONDS = 30.0

#: Longest wait for a judgement's processes to be gone.
END_SECONDS = 5.0

#: So much of the end of what a program printed is kept.
SHOWN_CHARACTERS = 1000

#: How a process ends that has used up its processor time.
TIME_IS_UP = (-signal.SIGXCPU, -signal.SIGKILL)

#: The kernel ends a process by its ticks; where machines are shared, these run ahead of the time that it has had, and
#: so little of its limit is then found to be used.
TICKS_AHEAD = 0.7


@dataclass(frozen=True)
class Limits:
    """What one judgement may use; memory, files and processor time count per process."""

    cpu_seconds: int = 3
    wall_seconds: float = 12.0
    memory_mib: int = 512
    processes: int = 8
    file_mib: int = 8
    tmp_mib: int = 32
    output_kib: int = 64


@dataclass(frozen=True)
class Job:
    """An untrusted program and the trusted test of its function `entry_point`.

    `setup` runs first, on the test's side: the definitions that the test uses. In `test`, the name `entry_point` is a
    function that asks the program, and each of `classes` makes an object that stays with the program: the test holds a
    handle, whose attributes it may read and set. `answer_within(seconds)` limits the time of each answer. Whatever the
    two draw from `random` is the same each time.
    """

    program: str
    entry_point: str
    test: str
    setup: str = ""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Script:
    """An untrusted program in another language that holds its own tests and, where they are passed, prints a word.

    `files` are written, name by name; the last of `commands` runs the program, those before it compile. It passes if
    all exit with 0 and `word` is printed; `signs` are texts that say that a test failed.
    """

    files: Mapping[str, str]
    commands: tuple[tuple[str, ...], ...]
    word: str
    signs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """A verdict (one of `VERDICTS`), what led to it in one line, the wall time it took, the end of what was printed."""

    verdict: str
    detail: str
    seconds: float
    printed: str = ""

    @property
    def is_doubtful(self) -> bool:
        """Whether a busy machine may be the reason, so that it does not count before a second time, alone."""
        return self.verdict in ("timeout", "sandbox")

    def record(self) -> dict[str, Any]:
        """The judgement as fields of a line of a file."""
        fields = {"verdict": self.verdict, "detail": self.detail, "seconds": round(self.seconds, 3)}
        return fields | ({"printed": self.printed} if self.printed else {})


class Sandbox:
    """Judges jobs; a context manager, whose entry proves that the sandbox works on this machine.

    Raises:
        PunaError: there is no bubblewrap, or it cannot work here; nothing is ever run without it.
    """

    def __init__(self, limits: Limits = Limits(), *, workers: int | None = None) -> None:
        self.limits = limits
        self.workers = workers or cpu_cores()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as cleanup:
            self._command, self.version = walled_python(cleanup)
            # A sandbox dies with the thread that started it, so the threads last as long as this object.
            self._threads = ThreadPoolExecutor(self.workers)
            self._thread = threading.local()
            self._places: list[_Place] = []
            cleanup.callback(self._close_places)
            cleanup.callback(self._threads.shutdown, cancel_futures=True)
            self._prove()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    @property
    def mechanism(self) -> str:
        """How programs are kept apart, for the record of a result."""
        uid = os.geteuid() or NOBODY
        return f"bubblewrap {self.version}, all namespaces, uid {uid}, Python {sys.version.split()[0]}"

    def judge(self, job: Job | Script) -> Judgement:
        """Runs one job, once."""
        return self.submit(job).result()

    def submit(self, job: Job | Script) -> Future[Judgement]:
        """Has one job run, once, by and by."""
        return self._threads.submit(self._judge, job)

    def start(self, role: str, channel: int, **streams: Any) -> subprocess.Popen[bytes]:
        """Starts what waits inside (`inside/main.py`) in a sandbox of its own, with this channel and nothing else."""
        limits = self.limits
        numbers = (channel, limits.cpu_seconds, limits.memory_mib << 20, limits.processes, limits.file_mib << 20)
        command = [*self._command, role, *map(str, numbers), str(limits.tmp_mib << 20)]
        return subprocess.Popen(command, pass_fds=[channel], env={}, **streams)

    def _close_places(self) -> None:
        for place in self._places:
            place.close()

    def _judge(self, job: Job | Script) -> Judgement:
        started = time.monotonic()
        try:
            if isinstance(job, Script):
                found = _run(self.limits, job, self._place("run"))
            else:
                found = _judged(self.limits, job, self._place("hold"), self._place("test"))
        except OSError as error:  # no more processes, no more memory, a sandbox that was killed from outside
            for place in vars(self._thread).values():
                place.close()
            found = ("sandbox", str(error), "")
        verdict, detail, printed = found
        return Judgement(verdict, detail, time.monotonic() - started, printed[-SHOWN_CHARACTERS:])

    def _place(self, role: str) -> "_Place":
        """The sandbox that the calling thread has for one half of its judgements."""
        place: _Place | None = getattr(self._thread, role, None)
        if place is None or place.closed:
            place = _Place(self, role)
            setattr(self._thread, role, place)
            self._places.append(place)
        return place

    def _prove(self) -> None:
        right = self.judge(Job("def f(x): return x + 1", "f", "assert f(1) == 2"))
        wrong = self.judge(Job("def f(x): return x", "f", "assert f(1) == 2"))
        if (right.verdict, wrong.verdict) != ("passed", "wrong"):
            failed = right if right.verdict != "passed" else wrong
            raise unusable(f"{failed.verdict} {failed.detail}")


# ---- one judgement


def _judged(limits: Limits, job: Job, holder: "_Place", tester: "_Place") -> tuple[str, str, str]:
    """Starts both halves, reads until the test has spoken or a limit is met, ends both: verdict, detail, words."""
    started = time.monotonic()
    with _Files() as files:
        (questions, ask), (answers, answer), (verdict, speak), (printed, write) = (files.pipe() for _ in range(4))
        program = files.of(encode([job.program, job.entry_point]))
        task = files.of(encode([job.entry_point, list(job.classes), job.setup, job.test]))
        holder.begin(program, questions, answer, write)
        tester.begin(task, answers, ask, speak)
        files.close(questions, ask, answers, answer, speak, write)
        heard = {verdict: bytearray(), printed: bytearray()}
        end = _listen(heard, verdict, printed, most=limits.output_kib << 10, until=started + limits.wall_seconds)
        # No proof, but a bound: a signal alone could be forged.
        out_of_time = time.monotonic() - started >= TICKS_AHEAD * limits.cpu_seconds
        hold_code, test_code = holder.end(), tester.end()
    said, words = (bytes(text).decode(errors="replace").strip() for text in heard.values())
    return *_verdict(limits, said, words, end, out_of_time, hold_code, test_code), words


def _verdict(
    limits: Limits, said: str, words: str, end: str, out_of_time: bool, hold_code: int | None, test_code: int | None
) -> tuple[str, str]:
    """What the test said, unless a limit was met or it could not say anything; and why."""
    kind, _, detail = said.partition("\t")
    if end == "late":
        return "timeout", f"no verdict after {limits.wall_seconds:g} s"
    if end == "flood":
        return "output", f"it printed more than {limits.output_kib} KiB"
    if hold_code is None or test_code is None:
        return "sandbox", "a sandbox was ended from outside"
    if kind not in VERDICTS and out_of_time and test_code in TIME_IS_UP:
        return "timeout", f"its answers cost the test more than {limits.cpu_seconds} s of processor time"
    if kind not in VERDICTS:
        return "sandbox", f"the test ended with code {test_code} and no verdict"
    if detail == NOT_STARTED:
        return kind, f"{detail}: {words[-SHOWN_CHARACTERS:]}"
    if detail == GONE and out_of_time and hold_code in TIME_IS_UP:
        return "timeout", f"it used more than {limits.cpu_seconds} s of processor time"
    if detail == GONE:
        return kind, f"{detail} (exit code {hold_code})"
    return kind, detail


def _run(limits: Limits, script: Script, runner: "_Place") -> tuple[str, str, str]:
    """Runs a program in another language until it has ended or a limit is met: verdict, detail, words."""
    started = time.monotonic()
    with _Files() as files:
        (ended, report), (printed, write) = files.pipe(), files.pipe()
        runner.begin(
            files.of(encode([dict(script.files), [list(command) for command in script.commands]])), write, report
        )
        files.close(report, write)
        heard = {ended: bytearray(), printed: bytearray()}
        end = _listen(heard, ended, printed, most=limits.output_kib << 10, until=started + limits.wall_seconds)
        runner.end()
    words = bytes(heard[printed]).decode(errors="replace").strip()
    elapsed = time.monotonic() - started
    return *_verdict_of_script(limits, script, bytes(heard[ended]).split(), words, end, elapsed), words


def _verdict_of_script(
    limits: Limits, script: Script, said: list[bytes], words: str, end: str, elapsed: float
) -> tuple[str, str]:
    if end == "late":
        return "timeout", f"not finished after {limits.wall_seconds:g} s"
    if end == "flood":
        return "output", f"it printed more than {limits.output_kib} KiB"
    if len(said) != 3:
        return "sandbox", f"nothing was run: {words[-SHOWN_CHARACTERS:]}"
    number, code, seconds = int(said[0]), int(said[1]), float(said[2])
    shown = words[-SHOWN_CHARACTERS:].replace("\n", " | ")
    is_killed = code in TIME_IS_UP and elapsed >= TICKS_AHEAD * limits.cpu_seconds
    is_spent = seconds >= TICKS_AHEAD * limits.cpu_seconds
    if is_killed or (code != 0 and is_spent):  # a shell goes on where a part was killed
        return "timeout", f"it used more than {limits.cpu_seconds} s of processor time"
    if number < len(script.commands) - 1:
        return "error", f"it does not compile: {shown}"
    if any(sign in words for sign in script.signs):
        return "wrong", shown
    if code != 0:
        return "error", f"it ended with code {code}: {shown}"
    if script.word not in words:  # wherever: a program may print before it without an end of line, and warn behind it
        return "error", f"it ended before its tests: {shown}"
    return "passed", ""


class _Place:
    """A sandbox in which one thread's programs, or tests, run one after the other, each in fresh namespaces."""

    def __init__(self, sandbox: Sandbox, role: str) -> None:
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(START_SECONDS)
        with theirs, open(os.memfd_create("complaints"), "w+b") as complaints:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": complaints}
            self._process = sandbox.start(role, theirs.fileno(), **quiet)
            theirs.close()
            self.closed = False
            if self._exit_code() is None:
                complaints.seek(0)
                raise unusable(complaints.read().decode(errors="replace").strip()[-1000:] or "no answer from inside")
        self._channel.settimeout(END_SECONDS)

    def begin(self, *files: int) -> None:
        """Starts a process with these files, which are given by their descriptors."""
        socket.send_fds(self._channel, [b"s"], files)

    def end(self) -> int | None:
        """Ends the process and all that it started, if they have not; how it ended, as `subprocess` counts."""
        try:
            self._channel.sendall(b"e")
        except OSError:
            self.close()
            return None
        return self._exit_code()

    def _exit_code(self) -> int | None:
        """What is said from inside; None, and the sandbox closed, if it is nothing."""
        try:
            text = self._channel.recv(4, socket.MSG_WAITALL)
        except OSError:
            text = b""
        if len(text) < 4:
            self.close()
        return int(text) if len(text) == 4 else None

    def close(self) -> None:
        """Ends the sandbox."""
        self.closed = True
        self._channel.close()
        self._process.kill()  # bubblewrap's; the process namespace dies with it
        self._process.wait()


class _Files:
    """The open files of one judgement, by their descriptors: nothing more, since one is made for every judgement."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def pipe(self) -> tuple[int, int]:
        """A pipe: where it is read, where it is written."""
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def of(self, content: bytes) -> int:
        """A file in memory, to be read from its beginning."""
        file = os.memfd_create("task")
        self._open.add(file)
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.lseek(file, 0, os.SEEK_SET)
        return file

    def close(self, *files: int) -> None:
        """Closes these."""
        for file in files:
            self._open.remove(file)
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self._open)


def _listen(
    heard: dict[int, bytearray], verdict: int, printed: int, *, most: int, until: float
) -> Literal["spoken", "flood", "late"]:
    """Reads into `heard` until the verdict ends, `most` bytes are passed by what is printed, or it is `until`."""
    poll = select.poll()
    for file in heard:
        poll.register(file, select.POLLIN)
    spoken = False
    while True:
        ready = poll.poll(0 if spoken else 1000 * max(0.0, until - time.monotonic()))
        if not ready and spoken:
            return "spoken"
        if time.monotonic() >= until:
            return "late"
        for file, _ in ready:
            chunk = os.read(file, 1 << 16)
            if not chunk:
                poll.unregister(file)
                spoken = spoken or file == verdict
            heard[file] += chunk[: most + 1 - len(heard[file])]
        if len(heard[printed]) > most:
            return "flood"
