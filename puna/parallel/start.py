"""Starting the processes of one machine, as torchrun does, without its restarts: `puna train RECIPE --nproc 4`.

Each process is the same command with its rank in the environment. Ctrl-C, SIGTERM and the end of the terminal reach all
of them, and so does SIGINT where no terminal sends it; when one fails, the others are stopped, and its exit code is the
command's. On Linux they are told to end, too, when the process that started them is killed, and so are those that
torchrun starts.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time

from puna.devices import cpu_cores
from puna.errors import UsageError
from puna.progress import complain, leave_terminal

#: How long the others may take to leave once one has failed.
GRACE_SECONDS = 20.0

#: The number of Linux' setting for the signal that a process gets when the one that started it has ended.
PR_SET_PDEATHSIG = 1

#: What Python runs in each process.
PUNA = ["-m", "puna"]


def words_to_start(devices: int, devices_per_node: int = 8) -> tuple[str, str]:
    """What starts a recipe on so many devices: the words before it and its overrides, and those behind."""
    if devices <= devices_per_node:
        return "puna train", f" --nproc {devices}" if devices > 1 else ""
    per_node = next(n for n in range(devices_per_node, 0, -1) if devices % n == 0)
    return "puna launch", f" --nodes {devices // per_node} --gpus {per_node} --master-addr HOST"


def start_processes(command: list[str], n_processes: int) -> int:
    """Runs `puna COMMAND` in several processes that form one group, and waits for them.

    Args:
        command: what follows `puna`.
        n_processes: how many; each takes one device, or its share of the cores.

    Returns:
        The exit code: 0, or that of the process that failed first.

    Raises:
        UsageError: `n_processes` is below 1, or this process is one of several already.
    """
    if n_processes < 1:
        raise UsageError(f"--nproc is {n_processes}; start 1 process or more")
    if "RANK" in os.environ:
        raise UsageError("--nproc is for one machine alone; under torchrun, leave it out")
    shared = {
        "WORLD_SIZE": str(n_processes),
        "LOCAL_WORLD_SIZE": str(n_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_cores() // n_processes))),
    }
    processes: list[subprocess.Popen[bytes]] = []
    starter = os.getpid()

    def interrupt(number: int, frame: object) -> None:
        if not _is_in_foreground():  # else all of them have it
            _send(processes, signal.SIGTERM)

    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, interrupt),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: _send(processes, number)),
    }

    def hang_up(number: int, frame: object) -> None:
        leave_terminal()
        _send(processes, number)

    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    try:
        for rank in range(n_processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, *PUNA, *command],
                    env={**os.environ, **shared, **own},
                    preexec_fn=lambda: _prepare(starter),
                )
            )
        return _wait(processes)
    finally:
        _send(processes, signal.SIGKILL)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_with_starter() -> None:
    """Has Linux tell this process to end, by SIGTERM, when the one that started it is killed; elsewhere, nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _prepare(starter: int) -> None:
    """In a process that is started, before it becomes the command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_starter()
    if os.getppid() != starter:  # it ended before this process had asked for the signal
        os.kill(os.getpid(), signal.SIGTERM)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Waits until all have ended; once one has failed, the others are told to, and then made to."""
    deadline = None
    code = 0
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed and deadline is None:
            code = processes[failed[0]].returncode
            if code < 0:
                complain(f"puna: the process of rank {failed[0]} was ended by {signal.Signals(-code).name}")
            deadline = time.monotonic() + GRACE_SECONDS
            _send(processes, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _send(processes, signal.SIGKILL)
        time.sleep(0.05)
    code = code or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - code if code < 0 else code


def _is_in_foreground() -> bool:
    """Whether this process's group is the one that its terminal sends Ctrl-C to."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY)
    except OSError:  # it has none
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


def _send(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
