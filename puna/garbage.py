"""Python's search for objects that refer to each other in circles, held less often than by default.

It begins whenever 700 objects more have been made than given up, and in its turn walks through all there are: with
torch loaded that takes as long as to convert tens of megabytes of weights, and documents are lists of many objects.
"""

import contextlib
import gc
from collections.abc import Iterator

#: Objects more, instead of 700; those in circles hold little memory until then.
SELDOM = 50_000


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """While open, or in a function that it decorates, the search is held seldom."""
    before = gc.get_threshold()
    gc.set_threshold(SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While open, the search is not held at all: what it would give up may not be given up now."""
    is_held = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_held:
            gc.enable()
