"""Kernels of Triton on a CPU: calls in a process in which its interpreter stands for its compiler."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (comes with torch's CUDA builds)")


def interpret(call: str) -> None:
    """Calls a function by its whole name, e.g. `tests.train.test_update_kernel.compare_all()`.

    In a process of its own, for the interpreter must be chosen before triton is imported.
    """
    module = call.partition("(")[0].rpartition(".")[0]
    code = f"import {module}, {__name__}; {__name__}._let_arrays_of_one_number_bound_loops(); {call}"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


def _let_arrays_of_one_number_bound_loops() -> None:
    """The interpreter of triton 3.6 relies on numpy to take them for integers, which 2.4 no longer does."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):  # type: ignore[no-untyped-def]
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
