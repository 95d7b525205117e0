"""Kernels of Triton on a CPU: calls in a process in which its interpreter stands for its compiler, or built alone."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (comes with torch's CUDA builds)")


def interpret(call: str) -> None:
    """Calls a function by its whole name, e.g. `tests.train.test_update_kernel.compare_all()`.

    In a process of its own, for the interpreter must be chosen before triton is imported.
    """
    module = call.partition("(")[0].rpartition(".")[0]
    code = f"import {module}, {__name__}; {__name__}._let_arrays_of_one_number_bound_loops(); {call}"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


def built_for_an_h100(call: Callable[[], object]) -> list[str]:
    """The kernels, in PTX, that a call would launch there, built for its own arguments; none is launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, built = JITFunction.run, []

    def build(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
        built.append(run(kernel, *arguments, warmup=True, **options).asm["ptx"])

    h100 = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: -1,  # no kernel of a device that is there
        get_current_stream=lambda device: 0,
    )
    with patch.object(driver, "_active", h100), patch.object(JITFunction, "run", build):
        call()
    return built


def _let_arrays_of_one_number_bound_loops() -> None:
    """The interpreter of triton 3.6 relies on numpy to take them for integers, which 2.4 no longer does."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):  # type: ignore[no-untyped-def]
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
