"""Schemes of quantisation: each file of this folder is one, found because it is there, and has

Linear          a `QuantizedLinear`: how a weight is stored, and how it multiplies
"""

import importlib
import pkgutil

from puna.errors import UsageError
from puna.quantized.linear import QuantizedLinear


def names() -> list[str]:
    """The schemes there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> type[QuantizedLinear]:
    """The layer of the scheme of this name.

    Raises:
        UsageError: there is none; the message lists those there are.
    """
    if name not in names():
        raise UsageError(f"there is no scheme {name!r}; there are {', '.join(names())}")
    layer: type[QuantizedLinear] = importlib.import_module(f"{__name__}.{name}").Linear
    return layer
