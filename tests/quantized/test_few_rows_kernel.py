"""The int8 kernel for CUDA devices against the plain formula, on the CPU by Triton's interpreter, on a GPU as it is."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from puna.quantized.schemes.int8 import product_reference

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (comes with torch's CUDA builds)")

#: Rows, outputs, depth: tiles of each kind, whole ones and such as are cut at every edge.
CASES = [(1, 64, 512), (3, 40, 272), (16, 33, 96), (17, 130, 300), (64, 100, 129)]


def factors(rows: int, outputs: int, depth: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, codes and scales, views into something larger."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth + 8, generator=generator).to(device, dtype)[:, :depth]
    codes = torch.randint(-127, 128, (outputs, depth + 16), generator=generator, dtype=torch.int8).to(device)[:, :depth]
    return x, codes, torch.rand(outputs, generator=generator).div(127).bfloat16().to(device)


def compare(case: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    from puna.quantized.few_rows_kernel import multiply

    x, codes, scales = factors(*case, dtype, device)
    found, expected = multiply(x, codes, scales), product_reference(x.double(), codes, scales)
    assert found.dtype == dtype
    assert (found - expected).norm() <= 3e-3 * expected.norm(), case
    alone = torch.cat([multiply(x[i : i + 1], codes, scales) for i in range(min(16, len(x)))])
    assert len(x) > 16 or torch.equal(alone, found), f"{case}: a row depends on the others"


@needs_triton
def test_the_kernel_interpreted_computes_the_formula() -> None:
    code = "from tests.quantized.test_few_rows_kernel import interpret; interpret()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


def interpret() -> None:
    """All cases on the CPU; not in bf16, whose bits the interpreter's products take for integers."""
    from tests.generate.test_paged_attention import _let_arrays_of_one_number_bound_loops

    _let_arrays_of_one_number_bound_loops()
    for case in CASES:
        compare(case, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, (1, 4096, 4096), (48, 1024, 8192)], ids=str)
def test_the_kernel_computes_the_formula_on_a_gpu(case: tuple[int, int, int], dtype: torch.dtype) -> None:
    compare(case, dtype, "cuda")


def test_a_compiled_model_holds_it_as_one_operation() -> None:
    arguments = factors(3, 40, 64, torch.bfloat16, "cpu")
    torch.library.opcheck(torch.ops.puna.int8_product.default, arguments)
    compiled = torch.compile(lambda *x: torch.ops.puna.int8_product(*x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), product_reference(*arguments) + 1)


def test_it_is_loaded_only_where_it_is_used() -> None:
    code = "import sys, puna.quantized.schemes.int8; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"puna.quantized.few_rows_kernel", "triton"} & set(loaded)
