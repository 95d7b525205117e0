"""The kernel for CUDA devices against the plain formulas, on the CPU by Triton's interpreter, on a GPU as it is."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.devices import multiplies_fp8
from puna.quantized.schemes import fp8, int8
from tests.triton_interpreter import built_for_an_h100, interpret, needs_triton

#: Rows, outputs, depth: tiles of each kind, whole ones and such as are cut at every edge; few outputs and many.
CASES = [(1, 64, 512), (3, 40, 272), (16, 33, 96), (17, 130, 300), (64, 100, 129), (5, 2070, 48)]


def factors(rows: int, outputs: int, depth: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, codes and scales, views into something larger."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth + 8, generator=generator).to(device, dtype)[:, :depth]
    codes = torch.randint(-127, 128, (outputs, depth + 16), generator=generator, dtype=torch.int8).to(device)[:, :depth]
    return x, codes, torch.rand(outputs, generator=generator).div(127).bfloat16().to(device)


def fp8_factors(rows: int, outputs: int, depth: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, one of them zeros, weights, and the scales of both, as the scheme rounds them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth, generator=generator) * 10.0 ** torch.arange(rows)[:, None].remainder(5)
    x[rows // 2] = 0 if rows > 1 else x[0]
    weight = torch.randn(outputs, depth, generator=generator)
    (x, x_scales), (weight, weight_scales) = fp8.round_rows(x), fp8.round_rows(weight)
    return tuple(part.to(device) for part in (x, weight, x_scales, weight_scales))


def compare(case: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    from puna.quantized.few_rows_kernel import multiply

    x, codes, scales = factors(*case, dtype, device)
    found, expected = multiply(x, [codes], [scales]), int8.product_reference(x.double(), codes, scales)
    assert found.dtype == dtype
    assert (found - expected).norm() <= 3e-3 * expected.norm(), case
    alone = torch.cat([multiply(x[i : i + 1], [codes], [scales]) for i in range(min(16, len(x)))])
    assert len(x) > 16 or torch.equal(alone, found), f"{case}: a row depends on the others"


def compare_fp8(case: tuple[int, int, int], device: str) -> None:
    from puna.quantized.few_rows_kernel import multiply

    x, weight, x_scales, weight_scales = fp8_factors(*case, device)
    found = multiply(x, [weight], [weight_scales.view(-1)], row_scales=x_scales.view(-1))
    expected = (x.double() @ weight.double().t()) * x_scales * weight_scales.t()
    assert found.dtype == torch.bfloat16
    errors = (found - expected).norm(dim=1)
    assert (errors <= 5e-3 * expected.norm(dim=1)).all(), case  # the interpreter cuts bf16 off where it is rounded
    alone = [
        multiply(x[i : i + 1], [weight], [weight_scales.view(-1)], row_scales=x_scales[i])
        for i in range(min(16, len(x)))
    ]
    assert len(x) > 16 or torch.equal(torch.cat(alone), found), f"{case}: a row depends on the others"


@needs_triton
def test_the_kernel_interpreted_computes_the_formula() -> None:
    interpret("tests.quantized.test_few_rows_kernel.compare_all()")


def compare_all() -> None:
    """All cases on the CPU; not in bf16, whose bits the interpreter's products take for integers."""
    for case in CASES:
        compare(case, torch.float16, "cpu")
        compare_fp8(case, "cpu")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_weights_are_read_16_bytes_at_a_time(dtype: torch.dtype) -> None:
    from puna.quantized.few_rows_kernel import multiply

    weights = [torch.zeros(outputs, 4096, dtype=dtype) for outputs in (4096, 1024, 1024)]
    x = torch.zeros(1, 4096, dtype=torch.float8_e4m3fn if dtype == torch.float8_e4m3fn else torch.bfloat16)
    scales = [torch.zeros(len(weight)) for weight in weights if dtype.itemsize == 1]
    row_scales = torch.zeros(1) if x.itemsize == 1 else None
    (ptx,) = built_for_an_h100(lambda: multiply(x, weights, scales, row_scales=row_scales))
    assert set(re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)) == {"0x10"}


@needs_triton
@pytest.mark.parametrize("stages", [3, 4, 6])
def test_lines_that_come_early_are_as_many_as_triton_can_number(monkeypatch: pytest.MonkeyPatch, stages: int) -> None:
    from puna.quantized import few_rows_kernel

    launched: dict[str, Any] = {}

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: launched.update(options)

    monkeypatch.setattr(few_rows_kernel, "_multiply", Kernel())
    monkeypatch.setattr(few_rows_kernel, "STAGES", stages)
    x, codes, scales = factors(3, 40, 272, torch.bfloat16, "cpu")
    few_rows_kernel.multiply(x, [codes], [scales])
    covered = launched["LINES"] * launched["LINE"]
    assert covered >= stages * launched["DEPTH"], "all that is on its way"
    assert launched["LINES"].bit_count() == 1, "a power of two"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("case", [*CASES, (1, 4096, 4096), (2, 1024, 8192), (48, 1024, 8192)], ids=str)
def test_the_kernel_computes_the_formula_on_a_gpu(case: tuple[int, int, int], dtype: torch.dtype) -> None:
    if dtype.itemsize == 2:
        compare(case, dtype, "cuda")
    elif multiplies_fp8(torch.device("cuda")):
        compare_fp8(case, "cuda")
    else:
        pytest.skip("needs a device that knows fp8 numbers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("width", [40, 8192, 22016])
def test_rows_are_rounded_to_the_bits_of_the_formula_on_a_gpu(width: int) -> None:
    if not multiplies_fp8(torch.device("cuda")):
        pytest.skip("needs a device that knows fp8 numbers")
    x = torch.randn(70, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3] = 0
    (found, scales), (expected, expected_scales) = fp8.round_rows(x.cuda()), fp8.round_rows(x)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


OPERATIONS = {
    "int8_product": (int8.product_reference, lambda rows: factors(rows, 40, 64, torch.bfloat16, "cpu")),
    "fp8_product": (fp8.product_reference, lambda rows: fp8_factors(rows, 40, 64)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_compiled_model_holds_it_as_one_operation_for_any_number_of_rows(name: str) -> None:
    operation, (reference, arguments) = getattr(torch.ops.puna, name), OPERATIONS[name]
    torch.library.opcheck(operation.default, arguments(3), test_utils="test_faketensor")
    made = []

    def note(graph, inputs):  # type: ignore[no-untyped-def]
        made.append(graph)
        return graph.forward

    torch.compiler.reset()  # it remembers sizes by the line that they came from
    compiled = torch.compile(lambda *x: operation(*x) + 1, fullgraph=True, backend=note)
    for rows in (9, 1, 2, 5, 30):
        assert torch.equal(compiled(*arguments(rows)), reference(*arguments(rows)) + 1)
    assert len(made) == 3, "for nine rows, for one, and for any other number"


def test_it_is_loaded_only_where_it_is_used() -> None:
    code = "import sys, puna.quantized.schemes.int8, puna.quantized.schemes.fp8; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"puna.quantized.few_rows_kernel", "puna.quantized.rows_kernel", "triton"} & set(loaded)
