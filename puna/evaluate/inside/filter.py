"""System calls that no solution of a task needs, refused: a smaller kernel to attack, and no way to leave a trace.

Keys outlive the process that adds them, so the next program could read them; the others reach into processes and
namespaces, or are where the kernel's faults have been. The rest of the kernel is as ever: what a program may reach is
the namespaces' matter.
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
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
}
CLONE = (56, 220)
CLONE3 = (435, 435)  # its flags cannot be seen from here; the C library falls back to clone
NEW_USER_NAMESPACE = 0x10000000

#: The numbers of another interface of x86_64 to the same calls begin here.
X32 = 0x40000000

LOAD, EQUAL, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026

#: Where a call's number, machine and first argument stand.
NUMBER, MACHINE, ARGUMENT = 0, 4, 16


def program(machine: str) -> bytes:
    """The filter for a machine, as the kernel reads it."""
    name, column = MACHINES[machine]
    steps = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, name), (RETURN, 0, 0, EPERM)]
    steps += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, EPERM)]
    for numbers in REFUSED.values():
        steps += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, EPERM)]
    steps += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ENOSYS)]
    steps += [(EQUAL, 0, 3, CLONE[column]), (LOAD, 0, 0, ARGUMENT), (HAS_BITS, 0, 1, NEW_USER_NAMESPACE)]
    steps += [(RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


class Filter:
    """The filter of this machine, made once and put on by each process that needs it."""

    def __init__(self) -> None:
        code = program(platform.machine())
        self._code = ctypes.create_string_buffer(code, len(code))
        self._header = struct.pack("@HP", len(code) // 8, ctypes.addressof(self._code))

    def put_on(self) -> None:
        """From here on this process and its children are refused those calls.

        Raises:
            OSError: the kernel cannot filter.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, self._header, 0, 0):  # no new privileges, then the filter
            raise OSError(ctypes.get_errno(), "the kernel refuses the filter of system calls")
