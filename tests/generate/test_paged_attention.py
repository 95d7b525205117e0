"""Attention to a pool of blocks: the formula against attention to tokens in order, the kernel against the formula."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from puna.devices import multiplies_fp8
from puna.generate.engine.paged_attention import attend_paged, attend_paged_reference
from puna.generate.engine.storage import GREATEST, Storage, round_heads
from puna.model.attention import attend_reference
from puna.model.layer_kernel import kernel
from tests.triton_interpreter import interpret, needs_triton

needs_cpu_kernel = pytest.mark.skipif(kernel() is None, reason="no AVX-512 BF16, or no C compiler")

#: N, K, H, block_size, lengths.
CASES = {
    "grouped": (8, 2, 64, 16, (1, 100, 0, 257)),
    "a head each": (3, 3, 32, 16, (65, 64)),
    "one head for all": (20, 1, 16, 32, (200,)),
    "narrow odd heads": (2, 1, 24, 16, (31, 0, 17)),
}


def scattered(
    shape: tuple[int, int, int, int, tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Queries of whole sequences, their keys and values in order, and the same in a shuffled pool, in tables, lengths.

    What no sequence holds is NaN in the pool and far outside of it in the tables.
    """
    heads, kv_heads, width, block_size, lengths = shape
    generator = torch.Generator().manual_seed(0)
    n, most = len(lengths), max(lengths)
    q = torch.randn(n, most, heads, width, generator=generator).to(dtype)
    k, v = (torch.randn(n, most, kv_heads, width, generator=generator).to(dtype) for _ in range(2))
    needed = [-(-length // block_size) for length in lengths]
    order = iter(torch.randperm(sum(needed) + 3, generator=generator).tolist())
    tables = torch.full((n, max(needed) + 2), 2**30, dtype=torch.int32)
    keys, values = torch.full((2, sum(needed) + 3, block_size, kv_heads, width), float("nan"), dtype=dtype)
    for row, length in enumerate(lengths):
        for place in range(length):
            if place % block_size == 0:
                tables[row, place // block_size] = next(order)
            block = int(tables[row, place // block_size])
            keys[block, place % block_size] = k[row, place]
            values[block, place % block_size] = v[row, place]
    return tuple(x.to(device) for x in (q, k, v, keys, values, tables, torch.tensor(lengths, dtype=torch.int32)))


def newest(q: Tensor, lengths: Tensor) -> Tensor:
    """(n, N, H) of the last token of each sequence; of an empty one, whichever."""
    return q[torch.arange(len(q), device=q.device), lengths.long() - 1]


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_the_newest_token_sees_what_it_would_see_in_order(
    shape: tuple[int, int, int, int, tuple[int, ...]],
) -> None:
    q, k, v, keys, values, tables, lengths = scattered(shape)
    found = attend_paged_reference(newest(q, lengths), keys, values, tables, lengths)
    expected = newest(attend_reference(q, k, v), lengths).where(lengths[:, None, None] > 0, 0.0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kept_in", GREATEST)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_in_8_bits_it_sees_what_was_rounded(
    shape: tuple[int, int, int, int, tuple[int, ...]], kept_in: torch.dtype
) -> None:
    q, _, _, keys, values, tables, lengths = scattered(shape)
    (keys, key_scales), (values, value_scales) = round_heads(keys, kept_in), round_heads(values, kept_in)
    found = attend_paged_reference(newest(q, lengths), keys, values, tables, lengths, key_scales, value_scales)
    rounded = (Storage(keys, key_scales).read(q.dtype), Storage(values, value_scales).read(q.dtype))
    assert torch.equal(found, attend_paged_reference(newest(q, lengths), *rounded, tables, lengths))


@pytest.mark.parametrize("is_rounded", [False, True])
def test_a_compiled_model_holds_it_as_one_operation(is_rounded: bool) -> None:
    q, _, _, *pool, tables, lengths = scattered(CASES["grouped"])
    pool, scales = zip(*(round_heads(x, torch.int8) if is_rounded else (x, None) for x in pool), strict=True)
    arguments = (newest(q, lengths), *pool, tables, lengths, *scales, torch.arange(len(q), dtype=torch.int32))
    torch.library.opcheck(torch.ops.puna.attend_paged.default, arguments)
    compiled = torch.compile(lambda *x: attend_paged(*x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), attend_paged_reference(*arguments[:-1]) + 1)


def test_the_kernel_and_torchs_compiler_are_loaded_only_where_they_are_used() -> None:
    code = "import sys, puna.generate; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "puna.generate.engine.paged_attention" in loaded
    assert not {"puna.generate.engine.paged_attention_kernel", "torch._dynamo"} & set(loaded)


@needs_cpu_kernel
@pytest.mark.parametrize("shape", [*CASES.values(), (32, 4, 128, 32, (700, 1, 63))], ids=str)
def test_the_kernel_of_a_cpu_computes_the_formula(shape: tuple[int, int, int, int, tuple[int, ...]]) -> None:
    q, _, _, *pool, tables, lengths = scattered(shape, torch.bfloat16)
    q = newest(q, lengths) * 3
    expected = attend_paged_reference(q.float(), *(x.float() for x in pool), tables, lengths)
    found = attend_paged(q, *pool, tables, lengths)
    assert (found - expected).norm() <= 3e-3 * expected.norm()
    rows = [attend_paged(q[i : i + 1], *pool, tables[i : i + 1], lengths[i : i + 1]) for i in range(len(q))]
    assert torch.equal(found, torch.cat(rows))


@needs_cpu_kernel
def test_what_is_not_a_number_on_a_cpu_does_not_become_one() -> None:
    q, _, _, *pool, tables, lengths = scattered(CASES["grouped"], torch.bfloat16)
    q = newest(q, lengths)
    q[1, 3] = torch.nan
    found = attend_paged(q, *pool, tables, lengths)
    assert found[1, 3].isnan().all()
    assert found.isnan().sum() == found[1, 3].numel()


def several(
    shape: tuple[int, int, int, int, tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """What `attend_paged` takes for up to 20 newest tokens of each sequence; an empty one has a row as well."""
    q, _, _, *pools, tables, lengths = scattered(shape, dtype, device)
    queries, sequences, seen, firsts = [], [], [], []
    for sequence, length in enumerate(lengths.tolist()):
        first = len(queries)
        for place in range(max(0, length - 20), max(1, length)):
            queries.append(q[sequence, place])
            sequences.append(sequence)
            seen.append(min(place + 1, length))
            firsts.append(first)
    seen, firsts = (torch.tensor(x, dtype=torch.int32, device=device) for x in (seen, firsts))
    return torch.stack(queries), *pools, tables[sequences], seen, None, None, firsts


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_some_newest_tokens_see_what_they_would_see_in_order(
    shape: tuple[int, int, int, int, tuple[int, ...]],
) -> None:
    whole, k, v, *_, lengths = scattered(shape)
    found, rows = attend_paged(*several(shape)), []
    for sequence, length in enumerate(lengths.tolist()):
        in_order = attend_reference(
            whole[sequence : sequence + 1], k[sequence : sequence + 1], v[sequence : sequence + 1]
        )
        rows.append(in_order[0, max(0, length - 20) : length] if length else torch.zeros_like(found[:1]))
    torch.testing.assert_close(found, torch.cat(rows))


@needs_triton
def test_the_kernel_interpreted_computes_the_formula() -> None:
    interpret("tests.generate.test_paged_attention.compare_all()")


def compare_all() -> None:
    """Compares all cases on the CPU; the interpreter must be chosen before triton is imported.

    Not in bf16, whose bits the interpreter's products take for integers.
    """
    for shape in CASES.values():
        for dtype in (torch.float32, torch.float16):
            for splits in (1, 3):
                for kept_in in (dtype, *GREATEST):
                    compare_kernel(shape, dtype, kept_in, "cpu", splits)
                    print(shape, dtype, kept_in, splits, "same")
        compare_several(shape, torch.float32, "cpu", 1)
        compare_several(shape, torch.float32, "cpu", 3)
    from puna.generate.engine.paged_attention_kernel import attend_paged as attend_by_kernel
    from puna.generate.engine.paged_attention_kernel import splits_to_fill

    q, _, _, keys, values, tables, lengths = scattered(CASES["grouped"])
    with pytest.raises(ValueError, match="must have the same strides"):
        attend_by_kernel(newest(q, lengths), keys, values.transpose(1, 2).contiguous().transpose(1, 2), tables, lengths)
    (keys, key_scales), (values, _) = (round_heads(x, torch.int8) for x in (keys, values))
    with pytest.raises(ValueError, match="the scales of keys and values must have the same strides"):
        attend_by_kernel(newest(q, lengths), keys, values, tables, lengths, key_scales, key_scales.mT.contiguous().mT)
    assert [splits_to_fill(132, programs, 32) for programs in (4, 32, 100, 132, 133, 1000)] == [32, 8, 2, 2, 1, 1]


def compare_kernel(
    shape: tuple[int, int, int, int, tuple[int, ...]],
    dtype: torch.dtype,
    kept_in: torch.dtype,
    device: str,
    splits: int | None,
) -> None:
    """The kernel against the formula; queries and the pool are views into something larger, as an engine may have."""
    from puna.generate.engine.paged_attention_kernel import attend_paged as attend_by_kernel

    q, _, _, keys, values, tables, lengths = scattered(shape, dtype, device)
    queries = torch.cat([newest(q, lengths)] * 2, dim=1)[:, : q.shape[2]]
    pools, scales = torch.stack([keys, values], dim=1), None
    if kept_in in GREATEST:
        pools, scales = round_heads(pools, kept_in)
    arguments = (queries, *pools.unbind(1), tables, lengths, *(() if scales is None else scales.unbind(1)))
    found = attend_by_kernel(*arguments, splits=splits)
    expected = attend_paged_reference(*arguments)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def compare_several(
    shape: tuple[int, int, int, int, tuple[int, ...]], dtype: torch.dtype, device: str, splits: int | None
) -> None:
    """The kernel against the formula, where sequences have several newest tokens."""
    from puna.generate.engine.paged_attention_kernel import attend_paged as attend_by_kernel

    arguments = several(shape, dtype, device)
    found, expected = attend_by_kernel(*arguments, splits=splits), attend_paged_reference(*arguments[:-1])
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [*CASES.values(), (32, 32, 128, 32, (1000, 3, 0, 77)), (64, 8, 128, 16, (4097,))])
def test_the_kernel_takes_several_tokens_of_a_sequence(shape: tuple[int, int, int, int, tuple[int, ...]]) -> None:
    compare_several(shape, torch.bfloat16, "cuda", None)


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(  # a kernel is built for each: not all pairs
    ("dtype", "kept_in"),
    [
        *((dtype, None) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        *((torch.bfloat16, x) for x in GREATEST),
    ],
)
@pytest.mark.parametrize(
    "shape",
    [*CASES.values(), (32, 32, 128, 16, (1000, 3, 0, 77)), (64, 8, 128, 16, (4097,)), (32, 4, 64, 64, (50,) * 80)],
)
def test_the_kernel_computes_the_formula(
    shape: tuple[int, int, int, int, tuple[int, ...]], dtype: torch.dtype, kept_in: torch.dtype | None
) -> None:
    if kept_in == torch.float8_e4m3fn and not multiplies_fp8(torch.device("cuda")):
        pytest.skip("needs a device that knows fp8 numbers")
    compare_kernel(shape, dtype, kept_in or dtype, "cuda", None)


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_replays_it_for_other_lengths() -> None:
    q, _, _, keys, values, tables, lengths = scattered(CASES["grouped"], torch.bfloat16, "cuda")
    arguments = (newest(q, lengths).contiguous(), keys, values, tables, lengths)
    attend_paged(*arguments)  # builds the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend_paged(*arguments)
    lengths -= torch.tensor([1, 50, 0, 3], dtype=torch.int32, device="cuda")
    graph.replay()
    torch.testing.assert_close(found, attend_paged_reference(*arguments), rtol=2e-2, atol=2e-2)
