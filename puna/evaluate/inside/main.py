"""The process that waits in a sandbox: for every judgement it makes a new one, in namespaces of its own.

Starting Python and bubblewrap costs more than most judgements, so both are started once. What a judgement could leave
to the next is made anew by the kernel: process, mount, IPC, host name and cgroup namespaces, and a `/tmp` in memory.
The new process gives up the capability that this took before it does anything else.

    judge ── b"s" + file descriptors ──▶ main ── clone ──▶ pid 1 of its own namespace: mount /tmp, drop all, `play`
          ── b"e" ─────────────────────▶       ── kill ──▶ and with it every process that it started
          ◀── exit code, 4 characters ──
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import sys

from .data import Pipe, decode, encode, read_all
from .filter import CLONE, MACHINES, put_on
from .hold import hold
from .run import run
from .test import test

#: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWPID. The network's stays: it has no way out, sockets for it are refused,
#: and Unix sockets end with their processes; making one takes as long as all the others.
FRESH = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000

#: MS_NOSUID | MS_NODEV
MOUNT_FLAGS = 2 | 4

#: What programs and tests commonly import is imported once; not `random`, whose state would be everyone's.
COMMON = ("bisect", "collections", "copy", "datetime", "functools", "hashlib", "heapq", "itertools")
USEFUL = ("math", "operator", "re", "string", "typing")

#: What the interpreter builds when it first compiles and runs such things is built once, for all processes.
REHEARSAL = """
from typing import Dict, List, Optional, Tuple
class A:
    def f(self, xs: List[int], y: Optional[str] = None) -> Tuple[int, ...]:
        try:
            return tuple(sorted({x * x for x in xs if x}))
        except ValueError as error:
            raise KeyError(f"{y}: {error}") from None
assert A().f([3, 1]) == (1, 9), "wrong"
"""

#: Most files in `/tmp`.
FILES = 4096


def main(role: str, channel_number: str, *limits: str) -> None:
    """Serves judgements until the channel is closed.

    Args:
        role: "hold", "test" or "run".
        channel_number: file descriptor of a Unix socket to the judge.
        limits: of a process: processor seconds, bytes of memory, processes, bytes of a file; and bytes of `/tmp`.
    """
    cpu_seconds, memory_bytes, processes, file_bytes, tmp_bytes = map(int, limits)
    for name in COMMON + USEFUL:
        __import__(name)
    exec(compile(REHEARSAL, "<rehearsal>", "exec"), {})
    decode(encode([("a", [1, 2.5, None], {"b": {True}}), {}]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    # Other languages' machines reserve far more addresses than they use; for them what is written to counts.
    memory = resource.RLIMIT_DATA if role == "run" else resource.RLIMIT_AS
    resource.setrlimit(memory, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    serve(role, int(channel_number), cpu_seconds, tmp_bytes)


def serve(role: str, channel_number: int, cpu_seconds: int, tmp_bytes: int) -> None:
    """See the module."""
    import gc
    import socket

    channel = socket.socket(fileno=channel_number)
    put_on()
    gc.freeze()  # what is here stays shared with every process that is made
    channel.sendall(b"   0")
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1, 4)
        if not message:
            return
        child = os.fork() if role == "test" else fresh_process()  # a test is trusted, and keeps to itself
        if child == 0:
            channel.close()
            try:
                if role != "test":
                    settle(tmp_bytes)
                resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
                play(role, descriptors)
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.recv(1)
        os.kill(child, signal.SIGKILL)
        channel.sendall(b"%4d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def play(role: str, descriptors: list[int]) -> None:
    """What a new process does: it holds a program whose words go to the last descriptor, or runs a test or commands."""
    if role == "run":
        task, words, report = descriptors
        files, commands = decode(read_all(task))
        run(files, commands, words, report)
    elif role == "hold":
        questions, answers, words = descriptors
        os.dup2(words, 1)
        os.dup2(words, 2)
        os.close(words)
        hold(Pipe(questions, answers))
        sys.stdout.flush()
    else:
        task, inbox, outbox, verdict = descriptors
        test(read_all(task), Pipe(inbox, outbox), verdict)


_libc = ctypes.CDLL(None, use_errno=True)
CAPABILITIES_OF_SELF = (ctypes.c_uint32 * 2)(0x20080522, 0)
NO_CAPABILITIES = (ctypes.c_uint32 * 6)()


def fresh_process() -> int:
    """Forks into fresh namespaces; returns as `os.fork` does.

    Raises:
        OSError: the kernel refuses.
    """
    child: int = _libc.syscall(CLONE[MACHINES[platform.machine()][1]], FRESH | signal.SIGCHLD, 0, 0, 0, 0)
    if child < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return child


def settle(tmp_bytes: int) -> None:
    """Leaves the process group, mounts an empty `/tmp`, then gives up every capability for good.

    Raises:
        OSError: the kernel refuses either.
    """
    os.setsid()  # a signal to the own group reaches all of it, in whatever namespace
    options = f"size={tmp_bytes},nr_inodes={FILES},mode=1777".encode()
    for result in (
        _libc.mount(b"tmpfs", b"/tmp", b"tmpfs", MOUNT_FLAGS, options),
        _libc.capset(CAPABILITIES_OF_SELF, NO_CAPABILITIES),
    ):
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.chdir("/tmp")
