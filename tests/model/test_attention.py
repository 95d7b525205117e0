"""Attention within documents, against the plain formula and its gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.model import attention, attention_in_blocks
from puna.model.attention import Documents, attend, attend_cached, attend_reference, attend_spans
from puna.model.attention_in_blocks import Span, attend_in_blocks
from puna.model.recompute import prepare_layers
from puna.testing import tiny_model

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
        torch.testing.assert_close(mine.grad, theirs.grad, atol=5e-6, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    heads=HEADS,
    width=st.sampled_from([2, 4, 16]),
    queries=st.sampled_from([1, 5, 16]),
    scores=st.sampled_from([1, 200, 1 << 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention_in_blocks_is_the_reference_forward_and_backward(
    lengths: list[int], heads: tuple[int, int], width: int, queries: int, scores: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(1, sum(lengths), n, width) for n in (heads[0], heads[1], heads[1])]
    ours = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    expected = [x.detach().float().requires_grad_() for x in ours]
    slope = torch.randn(shapes[0], generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_in_blocks, "QUERIES", queries)
        patch.setattr(attention_in_blocks, "SCORES", scores)
        out = attend_in_blocks(*(x[0] for x in ours), Span.of_documents(lengths))[None]
        grads = torch.autograd.grad(out, ours, slope)
    numbers = np.repeat(np.arange(len(lengths)), lengths)[None]
    reference = attend_reference(*expected, numbers)
    expected_grads = torch.autograd.grad(reference, expected, slope.float())
    assert {x.dtype for x in (out, *grads)} == {dtype}
    for mine, theirs in zip((out, *grads), (reference, *expected_grads), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        assert (mine.float() - theirs).norm() <= tolerance * theirs.norm() + tolerance / 10


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_long_documents_in_bf16_go_in_blocks_beside_short_ones(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "IN_BLOCKS_FROM", 6)
    monkeypatch.setattr(attention_in_blocks, "QUERIES", 4)
    seen: list[list[int]] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
        seen.append([span.queries_stop - span.queries_start for span in spans])
        return attend_in_blocks(q, k, v, spans)

    monkeypatch.setattr(attention, "attend_in_blocks", noted)
    for lengths, expected in (([[5, 6, 5], [16]], [[6], [16]]), ([[16], [16]], [[16, 16]])):
        numbers = numbers_of(lengths)
        qkv = [x.detach().bfloat16().requires_grad_() for x in random_qkv(0, 2, *heads)]
        out = attend(*qkv, Documents.of(numbers))
        assert seen == expected
        torch.testing.assert_close(out, attend_reference(*qkv, numbers), atol=3e-2, rtol=3e-2)
        changed = [x.detach().clone() for x in qkv]
        for x in changed:
            x[0, :5] += 1
        again = attend(changed[0].requires_grad_(), *changed[1:], Documents.of(numbers))
        assert torch.equal(out[1], again[1]), "a neighbour's bits"
        seen.clear()


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_attention_in_blocks_can_be_computed_again(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "IN_BLOCKS_FROM", 6)
    grads = []
    for recompute in ("none", mode):
        model = tiny_model()
        model.compute_dtype = torch.bfloat16
        prepare_layers(model, recompute=recompute, is_compiled=False)
        model(torch.arange(16)[None] + 5).float().square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain_grad, grad in zip(*grads, strict=True):
        assert torch.equal(plain_grad, grad)


def test_attention_in_blocks_is_known_to_the_meta_device() -> None:
    q, k = torch.empty(9, 4, 8, device="meta", requires_grad=True), torch.empty(9, 2, 8, device="meta")
    out = attend_in_blocks(q, k, k, Span.of_documents([4, 5]))
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=3),
    heads=HEADS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    from_numbers=st.sampled_from([1, 1 << 16]),
)
def test_the_last_queries_of_a_document_get_what_they_get_among_all(
    documents: list[tuple[int, int]], heads: tuple[int, int], dtype: torch.dtype, from_numbers: int
) -> None:
    generator = torch.Generator().manual_seed(len(documents))
    lengths = [asked + before for asked, before in documents]
    shapes = [(1, sum(lengths), n, 8) for n in (heads[0], heads[1], heads[1])]
    ours = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    theirs = [x.detach().float().requires_grad_() for x in ours]
    numbers = np.repeat(np.arange(len(lengths)), lengths)[None]
    is_asked = torch.cat([torch.arange(n) >= n - asked for n, (asked, _) in zip(lengths, documents, strict=True)])
    spans, query, key = [], 0, 0
    for asked, before in documents:
        spans.append(Span(query, query + asked, key, key + asked + before))
        query, key = query + asked, key + asked + before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "IN_BLOCKS_FROM", 6)
        patch.setattr(attention, "IN_BLOCKS_FROM_NUMBERS", from_numbers)
        patch.setattr(attention_in_blocks, "QUERIES", 4)
        out = attend_spans(ours[0][:, is_asked], *ours[1:], spans)
        expected = attend_reference(*theirs, numbers)[:, is_asked]
        slope = torch.randn(out.shape, generator=generator)
        grads = torch.autograd.grad(out, ours, slope.to(dtype))
    expected_grads = torch.autograd.grad(expected, theirs, slope)
    for mine, reference in zip((out, *grads), (expected, *expected_grads), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        assert (mine.float() - reference).norm() <= tolerance * reference.norm() + tolerance / 10


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
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_on_a_gpu_the_last_queries_of_a_document_get_what_they_get_among_all(heads: tuple[int, int]) -> None:
    """As chunks of a long prompt, and guesses behind a text, do."""
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    device = torch.accelerator.current_accelerator()
    generator = torch.Generator().manual_seed(0)
    for asked, before in ((100, 0), (65, 200), (1, 300), (7, 1)):
        shapes = [(1, asked + before, n, 64) for n in (heads[0], heads[1], heads[1])]
        q, k, v = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
        found = attend_spans(q[:, before:], k, v, [Span(0, asked, 0, asked + before)])
        torch.testing.assert_close(found, attend_reference(q, k, v)[:, before:], atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
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
