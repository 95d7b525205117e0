"""The errors that speak to the person at the terminal.

Whatever a user can cause or mend is a `PunaError` whose message says in one or two lines what was expected, what came
and what to do. The command line prints the message and exits with `exit_code`; anything else that escapes is a defect
of ours and keeps its traceback.
"""

import errno

#: Numbers of the errors of a system that has no room for what is written.
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT}


class PunaError(Exception):
    """The work cannot be done; the message says what, where and the way out (exit code 1)."""

    exit_code = 1


class UsageError(PunaError):
    """The request itself is wrong: a field, an option or an argument (exit code 2)."""

    exit_code = 2


class Stopped(PunaError):
    """The work was told to stop and has saved its state, on all ranks at the same place.

    Args:
        message: for the user.
        number: of the signal that told it; 128 more is the exit code, as a shell has it.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
