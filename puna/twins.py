"""Packages that are called like the function they are named after.

`puna.train` is a package (`from puna.train.loss import …`) and the Python twin of a command (`puna.train(recipe)`).
"""

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


def make_callable(package: str) -> None:
    """Lets the imported package `puna.NAME` be called as its function NAME."""
    sys.modules[package].__class__ = _CallableModule
