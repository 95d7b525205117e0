"""The kernel of attention on a CPU against the plain formula and against blocks of torch's products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.model import attention_in_blocks, attention_kernel
from puna.model.attention import Documents, attend, attend_reference
from puna.model.attention_in_blocks import Span, attend_in_blocks

needs_kernel = pytest.mark.skipif(attention_kernel.kernel() is None, reason="no AVX-512 BF16, or no C compiler")


def _qkv(n_queries: int, n_keys: int, heads: tuple[int, int], width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n_queries + n_keys)
    shapes = (n_queries, heads[0], width), (n_keys, heads[1], width), (n_keys, heads[1], width)
    return [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]


def _by_formula(q: Tensor, k: Tensor, v: Tensor, spans: list[Span]) -> Tensor:
    parts = []
    for span in spans:
        keys = slice(span.keys_start, span.keys_stop)
        n_hidden = span.keys_stop - span.keys_start - (span.queries_stop - span.queries_start)
        queries = q[span.queries_start : span.queries_stop]
        before = torch.zeros(n_hidden, *q.shape[1:])  # queries of tokens that are not asked for
        parts.append(attend_reference(torch.cat([before, queries])[None], k[None, keys], v[None, keys])[0, n_hidden:])
    return torch.cat(parts)


def _with_grads(out: Tensor, qkv: list[Tensor]) -> list[Tensor]:
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, qkv, slope)]


def _error(found: Tensor, expected: Tensor) -> float:
    """Of the norm; a gradient may be exactly 0, as the only key's is."""
    return ((found.float() - expected).norm() / (expected.norm() + 1e-2 * expected.numel() ** 0.5)).item()


@needs_kernel
@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(1, 210), st.integers(0, 120)), min_size=1, max_size=4),
    heads=st.sampled_from([(2, 2), (4, 1), (6, 2)]),
    width=st.sampled_from([64, 128]),
)
def test_the_kernel_is_the_formula_forward_and_backward(
    documents: list[tuple[int, int]], heads: tuple[int, int], width: int
) -> None:
    spans, query, key = [], 0, 0
    for asked, before in documents:
        spans.append(Span(query, query + asked, key, key + asked + before))
        query, key = query + asked, key + asked + before
    qkv = _qkv(query, key, heads, width)
    assert attention_kernel.serves(*qkv)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    found = _with_grads(attend_in_blocks(*qkv, spans), qkv)
    expected = _with_grads(_by_formula(*exact, spans), exact)
    # A query of two to seven keys may have a gradient that is the small rest of large numbers.
    allowed = 6e-3 if all(sum(document) >= 8 for document in documents) else 0.04
    assert max(_error(*pair) for pair in zip(found, expected, strict=True)) < allowed


@needs_kernel
def test_the_kernel_is_nearer_the_formula_than_blocks_of_products_are(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = Span.of_documents([300, 100])
    qkv = _qkv(400, 400, (2, 2), 64)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    expected = _with_grads(_by_formula(*exact, spans), exact)
    found = _with_grads(attend_in_blocks(*qkv, spans), qkv)
    monkeypatch.setattr(attention_in_blocks.attention_kernel, "kernel", lambda: None)
    others = _with_grads(attend_in_blocks(*qkv, spans), qkv)
    for ours, other, true in zip(found, others, expected, strict=True):
        assert _error(ours, true) < _error(other, true) < 0.02


@needs_kernel
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_a_document_of_several_blocks_is_the_formula(heads: tuple[int, int]) -> None:
    spans = [Span(0, 620, 0, 620), Span(620, 640, 620, 1150)]
    qkv = _qkv(640, 1150, heads, 64)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    found = _with_grads(attend_in_blocks(*qkv, spans), qkv)
    expected = _with_grads(_by_formula(*exact, spans), exact)
    assert max(_error(*pair) for pair in zip(found, expected, strict=True)) < 6e-3


@needs_kernel
def test_two_runs_of_queries_of_one_document_add_their_gradients() -> None:
    spans = [Span(0, 50, 0, 80), Span(50, 90, 0, 160), Span(90, 100, 160, 200)]
    qkv = _qkv(100, 200, (4, 2), 64)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    found = _with_grads(attend_in_blocks(*qkv, spans), qkv)
    expected = _with_grads(_by_formula(*exact, spans), exact)
    assert max(_error(*pair) for pair in zip(found, expected, strict=True)) < 6e-3


@needs_kernel
def test_bits_depend_neither_on_threads_nor_on_neighbours() -> None:
    q, k, v = (x.detach() for x in _qkv(300, 300, (2, 2), 64))
    alone = attend_in_blocks(q[:170], k[:170], v[:170], Span.of_documents([170]))
    threads = torch.get_num_threads()
    for n in (1, 3):
        torch.set_num_threads(n)
        assert torch.equal(attend_in_blocks(q, k, v, Span.of_documents([170, 130]))[:170], alone)
    torch.set_num_threads(threads)


@needs_kernel
def test_keys_and_values_may_lie_in_wider_rows() -> None:
    q, k, v = (x.detach() for x in _qkv(70, 70, (2, 2), 64))
    both = torch.cat([k, v], dim=1)
    found = attend_in_blocks(q, both[:, :2], both[:, 2:], Span.of_documents([70]))
    assert torch.equal(found, attend_in_blocks(q, k, v, Span.of_documents([70])))


@needs_kernel
def test_great_scores_neither_overflow_nor_hide_what_is_not_a_number() -> None:
    q, k, v = (x.detach() for x in _qkv(200, 200, (1, 1), 64))
    found = attend_in_blocks(q * 100, k * 100, v, Span.of_documents([200]))
    expected = _by_formula(q.float() * 100, k.float() * 100, v.float(), Span.of_documents([200]))
    assert _error(found, expected) < 0.02
    q[5, 0, 3] = torch.nan
    k[100, 0, 3] = torch.nan
    found = attend_in_blocks(q, k, v, Span.of_documents([200]))
    is_nan = found.isnan().all(dim=-1)[:, 0]
    assert is_nan.nonzero()[:, 0].tolist() == [5, *range(100, 200)]
    assert found[~is_nan].isfinite().all()


@needs_kernel
def test_documents_of_any_length_go_through_the_kernel_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = attention_kernel.kernel()
    assert kernel is not None
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *args: calls.append(args[3]) or forward(*args))
    q, k, v = (x.detach().view(2, 50, 2, 64) for x in _qkv(100, 100, (2, 2), 64))
    numbers = torch.tensor([[0] * 3 + [1] * 47, [2] * 49 + [3]]).numpy()
    out = attend(q, k, v, Documents.of(numbers))
    assert calls == [[0, 3, 0, 3, 3, 50, 3, 50, 50, 99, 50, 99, 99, 100, 99, 100]]
    assert _error(out, attend_reference(q.float(), k.float(), v.float(), numbers)) < 6e-3
