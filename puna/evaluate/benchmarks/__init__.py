"""The benchmarks: one file each, found because it is there.

A benchmark is a module with one function, `evaluate(*, model, tokenizer, …) -> dict`: its keyword arguments are the
benchmark's options, its docstring's first line is what `puna evaluate --help` could say of it, and the dict that it
returns, which starts with `{"benchmark": NAME, …}`, is what `--json` prints.
"""

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from puna.errors import UsageError


def names() -> list[str]:
    """The benchmarks there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
    """The module of a benchmark.

    Raises:
        UsageError: there is no such benchmark; the message lists those there are.
    """
    if name not in names():
        raise UsageError(f"there is no benchmark {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def check_options(benchmark: ModuleType, options: dict[str, Any]) -> None:
    """Refuses options that the benchmark does not have.

    Raises:
        UsageError: an option it does not know; the message lists those it knows.
    """
    known = inspect.signature(benchmark.evaluate).parameters
    unknown = [name for name in options if name not in known]
    if unknown:
        name = benchmark.__name__.rpartition(".")[2]
        raise UsageError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
