"""System calls that no solution of a task needs, refused: no network, no trace left, a smaller kernel to attack.

Sockets other than Unix ones would reach a network if there were one. Keys outlive the process that adds them, so the
next program could read them. The others reach into processes, make user namespaces, or are where the kernel's faults
have been. The filter is put on once, by the process that waits; those that it makes inherit it and cannot take it off.
"""

from __future__ import annotations

import ctypes
import platform
import struct

#: Machine -> what the kernel calls it, and which column of the tables is its.
MACHINES = {
    "x86_64": (0xC000003E, 0),
    "aarch64": (0xC00000B7, 1),
    "riscv64": (0xC00000F3, 1),
    "loongarch64": (0xC0000102, 1),
}

#: System call -> its numbers.
REFUSED = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setns": (308, 268),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
}
CLONE, UNSHARE = (56, 220), (272, 97)
NEW_USER_NAMESPACE = 0x10000000
CLONE3 = (435, 435)  # its flags cannot be seen from here; the C library falls back to clone
SOCKET, UNIX = (41, 198), 1

#: The numbers of another interface of x86_64 to the same calls begin here.
X32 = 0x40000000

LOAD, EQUAL, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026

#: Where a call's number, machine and first argument stand.
NUMBER, MACHINE, ARGUMENT = 0, 4, 16

Step = tuple[int, int, int, int]


def program(machine: str) -> bytes:
    """The filter for a machine, as the kernel reads it."""
    name, column = MACHINES[machine]
    steps: list[Step] = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, name), (RETURN, 0, 0, EPERM)]
    steps += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, EPERM)]
    for numbers in REFUSED.values():
        steps += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, EPERM)]
    steps += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ENOSYS)]
    for call in (CLONE, UNSHARE):
        steps += _unless(call[column], (HAS_BITS, 1, 0, NEW_USER_NAMESPACE))
    steps += _unless(SOCKET[column], (EQUAL, 0, 1, UNIX))
    steps += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _unless(number: int, test: Step) -> list[Step]:
    """Steps for one call: allowed where the test of its first argument goes on to the next step, else refused."""
    return [(EQUAL, 0, 4, number), (LOAD, 0, 0, ARGUMENT), test, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, EPERM)]


def put_on() -> None:
    """From here on this process and its children are refused those calls.

    Raises:
        OSError: the kernel cannot filter, or this processor's system calls are not known here.
    """
    if platform.machine() not in MACHINES:
        raise OSError(f"the sandbox knows the system calls of {', '.join(MACHINES)}, not of {platform.machine()}")
    code = program(platform.machine())
    steps = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(steps))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, header, 0, 0):  # no new privileges, then the filter
        raise OSError(ctypes.get_errno(), "the kernel refuses the filter of system calls")
