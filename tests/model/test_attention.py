"""Attention within documents, against the plain formula and its gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.model.attention import Documents, attend, attend_cached, attend_reference

T, H = 16, 4


def random_qkv(seed: int, batch: int, heads: int, kv_heads: int, length: int = T) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, n, H) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def numbers_of(lengths: list[list[int]]) -> np.ndarray:
    """(B, T) document numbers of rows whose document parts have these lengths; what is left is one more."""
    rows = np.zeros((len(lengths), T), dtype=np.int32)
    for row, parts in zip(rows, lengths, strict=True):
        ends = np.cumsum(parts)
        row[:] = np.searchsorted(ends, np.arange(T), side="right")
    return rows


def plain(q: Tensor, k: Tensor, v: Tensor, numbers: np.ndarray) -> Tensor:
    """Attention one query and head at a time, in fp64: what `attend_reference` itself is held against."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = [s for s in range(t + 1) if numbers[b, s] == numbers[b, t]]
        keys, values = k[b, seen, n // group].double(), v[b, seen, n // group].double()
        out[b, t, n] = (keys @ q[b, t, n].double() / H**0.5).softmax(0) @ values
    return out


LENGTHS = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=6), min_size=1, max_size=3)
HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1)])


@settings(max_examples=8, deadline=None)
@given(lengths=LENGTHS, heads=HEADS, seed=st.integers(0, 99))
def test_the_reference_is_the_formula_written_out(lengths: list[list[int]], heads: tuple[int, int], seed: int) -> None:
    numbers = numbers_of(lengths)
    qkv = [x.detach() for x in random_qkv(seed, len(lengths), *heads)]
    torch.testing.assert_close(attend_reference(*qkv, numbers).double(), plain(*qkv, numbers), atol=1e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, heads=HEADS, seed=st.integers(0, 99))
def test_attend_is_the_reference_forward_and_backward(
    lengths: list[list[int]], heads: tuple[int, int], seed: int
) -> None:
    numbers = numbers_of(lengths)
    ours, expected = random_qkv(seed, len(lengths), *heads), random_qkv(seed, len(lengths), *heads)
    out = attend(*ours, Documents.of(numbers))
    reference = attend_reference(*expected, numbers)
    torch.testing.assert_close(out, reference, atol=1e-6, rtol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1))
    (out * weights).sum().backward()
    (reference * weights).sum().backward()
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.grad is not None
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_without_documents_each_row_is_one(heads: tuple[int, int]) -> None:
    qkv = [x.detach() for x in random_qkv(0, 2, *heads)]
    torch.testing.assert_close(attend(*qkv), attend_reference(*qkv), atol=1e-6, rtol=1e-5)
    whole = np.zeros((2, T), dtype=np.int32)
    torch.testing.assert_close(attend(*qkv, Documents.of(whole)), attend_reference(*qkv), atol=1e-6, rtol=1e-5)


def test_a_document_sees_nothing_of_its_neighbours() -> None:
    numbers = numbers_of([[5, 6, 5]])
    qkv = [x.detach() for x in random_qkv(0, 1, 4, 2)]
    before = attend(*qkv, Documents.of(numbers))
    changed = [x.clone() for x in qkv]
    for x in changed:
        x[:, 5:11] += 1
    after = attend(*changed, Documents.of(numbers))
    assert torch.equal(before[:, :5], after[:, :5])
    assert torch.equal(before[:, 11:], after[:, 11:])
    assert not torch.equal(before[:, 5:11], after[:, 5:11])


@settings(max_examples=40, deadline=None)
@given(
    heads=HEADS,
    seed=st.integers(0, 99),
    starts=st.lists(st.integers(0, T - 3), min_size=1, max_size=3),
)
def test_cached_attention_is_the_reference_at_each_rows_own_positions(
    heads: tuple[int, int], seed: int, starts: list[int]
) -> None:
    q, k, v = (x.detach() for x in random_qkv(seed, len(starts), *heads))
    positions = torch.tensor([[start, start + 1, start + 2] for start in starts])
    rows = torch.arange(len(starts))[:, None]
    ours = attend_cached(q[rows, positions], k, v, positions)
    torch.testing.assert_close(ours, attend_reference(q, k, v)[rows, positions], atol=1e-6, rtol=1e-5)


def test_documents_are_found_where_numbers_change_and_at_every_row() -> None:
    documents = Documents.of(np.array([[0, 0, 1, 1, 1, 2], [2, 2, 2, 2, 2, 2], [0, 1, 0, 1, 0, 1]]))
    assert documents.lengths == (2, 3, 1, 6, 1, 1, 1, 1, 1, 1)
    assert documents.starts.tolist() == [0, 2, 5, 6, 12, 13, 14, 15, 16, 17, 18]
    assert documents.starts.dtype == torch.int32
    assert documents.longest == 6


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_flash_attention_over_packed_documents_is_the_reference(heads: tuple[int, int]) -> None:
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    numbers = np.repeat(np.arange(6, dtype=np.int32), [200, 56, 1, 255, 300, 212]).reshape(2, 512)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 512, n, 64) for n in (heads[0], heads[1], heads[1])]
    values = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]
    ours, expected = ([x.detach().clone().requires_grad_() for x in values] for _ in range(2))
    out, reference = attend(*ours, Documents.of(numbers, device)), attend_reference(*expected, numbers)
    torch.testing.assert_close(out, reference, atol=2e-2, rtol=2e-2)
    slope = torch.randn(out.shape, generator=generator).to(device, torch.bfloat16)
    grads, expected_grads = torch.autograd.grad(out, ours, slope), torch.autograd.grad(reference, expected, slope)
    torch.testing.assert_close(grads, expected_grads, atol=5e-2, rtol=5e-2)
