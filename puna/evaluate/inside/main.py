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

from .data import Pipe, decode, read_all
from .filter import CLONE, MACHINES, put_on
from .hold import hold
from .rehearsal import rehearse
from .run import run
from .test import compile_ahead, test

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWPID. The network's stays: it has no way out, sockets for it are refused,
#: and Unix sockets end with their processes; making one takes as long as all the others.
FRESH = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000

#: MS_NOSUID | MS_NODEV
MOUNT_FLAGS = 2 | 4

#: What programs and tests commonly import is imported once; not `random`, whose state would be everyone's, nor
#: `hashlib`, whose library is larger than all others together: every process that is made would pay for it.
COMMON = ("bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools")
USEFUL = ("math", "operator", "re", "string", "typing")

#: Most descriptors that a process is given.
DESCRIPTORS = 4

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
    if role != "run":
        rehearse()
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
    from _socket import CMSG_SPACE, socket  # `socket` itself brings more, for every process to carry

    channel = socket(fileno=channel_number)
    put_on()
    clone = CLONE[MACHINES[platform.machine()][1]]
    gc.freeze()  # what is here stays shared with every process that is made
    channel.sendall(b"   0")
    known, task = b"", None
    while True:
        message, sent, _, _ = channel.recvmsg(1, CMSG_SPACE(4 * DESCRIPTORS))
        if not message:
            return
        descriptors = memoryview(sent[0][2]).cast("i").tolist()
        if role == "test" and (text := read_all(descriptors[0])) != known:  # most are of the task before
            known, task = text, decode(text)
            compile_ahead(task)
        child = os.fork() if role == "test" else fresh_process(clone)  # a test is trusted, and keeps to itself
        if child == 0:
            channel.close()
            try:
                if role != "test":
                    settle(tmp_bytes)
                resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
                play(role, task, descriptors)
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.recv(1)
        os.kill(child, signal.SIGKILL)
        channel.sendall(b"%4d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def play(role: str, task: Any, descriptors: list[int]) -> None:
    """What a new process does: it holds a program whose words go to the last descriptor, or runs a test or commands."""
    if role == "run":
        script, words, report = descriptors
        files, commands = decode(read_all(script))
        run(files, commands, words, report)
    elif role == "hold":
        file, questions, answers, words = descriptors
        os.dup2(words, 1)
        os.dup2(words, 2)
        program, entry_point = decode(read_all(file))
        os.close(words)
        os.close(file)
        hold(program, entry_point, Pipe(questions, answers))
        sys.stdout.flush()
    else:
        _, inbox, outbox, verdict = descriptors
        test(task, Pipe(inbox, outbox), verdict)


_libc = ctypes.CDLL(None, use_errno=True)
CAPABILITIES_OF_SELF = (ctypes.c_uint32 * 2)(0x20080522, 0)
NO_CAPABILITIES = (ctypes.c_uint32 * 6)()


def fresh_process(clone: int) -> int:
    """Forks into fresh namespaces, by the system call `clone`; returns as `os.fork` does.

    Raises:
        OSError: the kernel refuses.
    """
    child: int = _libc.syscall(clone, FRESH | signal.SIGCHLD, 0, 0, 0, 0)
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
