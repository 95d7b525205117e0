"""Two hosts on one machine: Linux network namespaces with an address each and a cable between them.

    host 0 (10.77.0.1, eth0) ────── (eth0, 10.77.0.2) host 1

What runs on one reaches the other by its address alone, as machines do; files and processors are shared. They need root
and `ip` of iproute2. Whatever still runs on a host when it is taken down is killed.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: The end of the cable on each host.
INTERFACE = "eth0"


class NoHosts(Exception):
    """Hosts cannot be made here; the message says why."""


@dataclass(frozen=True)
class Host:
    """A network namespace with its address."""

    name: str
    address: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: str, *, folder: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Starts a line of shell on the host; its output goes to `log`."""
        with open(log, "wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "bash", "-c", command],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.started.append(process)
        return process

    def processes(self) -> dict[int, list[str]]:
        """Process -> its command line, for all that run on the host."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        commands = {}
        for pid in map(int, listed):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                commands[pid] = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
        return commands

    def clear(self, *, timeout_seconds: float = 10) -> None:
        """Kills all that runs on the host, and waits until it is gone."""
        deadline = time.monotonic() + timeout_seconds
        while (running := self.processes()) and time.monotonic() < deadline:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for process in self.started:
            process.wait(timeout_seconds)

    def remove(self) -> None:
        """Takes the host down, and all that runs on it."""
        self.clear()
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other, for as long as the block lasts.

    Raises:
        NoHosts: no root, no `ip`, or a kernel that makes no network namespaces.
    """
    if os.name != "posix" or os.geteuid() != 0:
        raise NoHosts("network namespaces need root")
    if shutil.which("ip") is None:
        raise NoHosts("network namespaces need `ip` of iproute2")
    _remove_leftovers()
    hosts = tuple(Host(f"puna-{os.getpid()}-{number}", f"10.77.0.{number + 1}") for number in range(2))
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        first, second = hosts
        cable = ["link", "add", INTERFACE, "netns", first.name, "type", "veth"]
        _ip(*cable, "peer", "name", INTERFACE, "netns", second.name)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.name, "link", "set", INTERFACE, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield first, second
    finally:
        for host in hosts:
            host.remove()


def _remove_leftovers() -> None:
    """Takes down the hosts of processes that were killed before they could do it."""
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
        name = line.split()[0] if line else ""
        owner = re.fullmatch(r"puna-(\d+)-\d", name)
        if owner and not Path("/proc", owner[1]).exists():
            Host(name, "").remove()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NoHosts(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
