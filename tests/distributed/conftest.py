"""What tests of several processes share."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.ranks import calls_in_ranks


@pytest.fixture(scope="session")
def in_ranks() -> Callable[..., list[Any]]:
    """Calls a function in so many processes joined by gloo; gives what each returned, None of one that died."""
    return calls_in_ranks()
