r"""The text of a completion while it grows: whole characters, cut before a stop string, nothing ever taken back.

Following "ab\n\ndef" with stop "\n\ndef", token by token:

    push "a"   -> "a"
    push "b\n" -> "b"     "\n" could begin the stop string: held back
    push "\nd" -> ""      still could
    push "ef"  -> ""      it did: the text is "ab", and `is_stopped`
"""

from collections.abc import Iterable


class StoppableText:
    """Text that arrives in pieces and ends before the first stop string.

    The stop string that is complete first counts, wherever pieces begin and end; of two that end together the longer.

    Attributes:
        text: what was given out so far.
        is_stopped: a stop string came; nothing follows.
    """

    def __init__(self, stop: Iterable[str] = ()) -> None:
        self.stop = tuple(stop)
        self.text = ""
        self.is_stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """Adds a piece; returns what can be given out now."""
        if self.is_stopped:
            return ""
        self._held += piece
        found = [(at + len(stop), at) for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return self._give(min(found)[1])
        return self._give(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """Returns what was held back for a stop string that did not come."""
        return "" if self.is_stopped else self._give(len(self._held))

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self.stop), default=1) - 1)
        ends = (length for length in range(longest, 0, -1))
        return next((n for n in ends if any(stop.startswith(self._held[-n:]) for stop in self.stop)), 0)
