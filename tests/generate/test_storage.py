"""Keys and values in 8 bits: what comes back of them, what they take, and what they change of completions."""

import pytest
import torch
from torch import Tensor

from puna.devices import multiplies_fp8
from puna.errors import UsageError
from puna.generate import Sampling, complete
from puna.generate.engine import Engine
from puna.generate.engine.draft_model import DraftModel
from puna.generate.engine.storage import GREATEST, IN_8_BITS, Storage, round_heads, storage_dtype, token_bytes
from puna.model.config import preset
from puna.model.llama import Llama
from puna.testing import tiny_model
from tests.triton_interpreter import interpret, needs_triton

INT8, FP8 = GREATEST
CPU = torch.device("cpu")


def came_back(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What heads (…, H) are read as, and their scales (…, 1)."""
    numbers, scales = round_heads(x, dtype)
    assert numbers.dtype == dtype
    return Storage(numbers, scales).read(torch.float32), scales[..., None]


def heads_of_all_sizes() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(30, 64, generator=generator) * 10.0 ** torch.arange(-25, 5)[:, None]
    outlier = torch.randn(5, 64, generator=generator)
    outlier[:, 7] = torch.tensor([50.0, -300.0, 1e4, -65504.0, 1e30])
    return torch.cat([alike, outlier, torch.zeros(1, 64)])


def test_an_int8_is_off_by_half_a_step_at_most() -> None:
    x = heads_of_all_sizes()
    found, scales = came_back(x, INT8)
    assert torch.equal(scales[:-1, 0], x.abs().amax(1)[:-1] / 127)
    assert ((found - x).abs() <= scales / 2 * (1 + 1e-5)).all()


def test_an_fp8_is_off_by_a_sixteenth_or_by_a_1024th_of_the_scale() -> None:
    x = heads_of_all_sizes()
    found, scales = came_back(x, FP8)
    assert ((found - x).abs() <= torch.maximum(x.abs() / 16, scales / 1024) * (1 + 1e-5)).all()


def test_int8_is_finer_where_numbers_are_alike_and_fp8_beside_a_great_one() -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    greater = x.clone()
    greater[:, 7] = 30.0
    for numbers, finer, coarser in ((x, INT8, FP8), (greater, FP8, INT8)):
        errors = {dtype: (came_back(numbers, dtype)[0] - numbers).square().mean() for dtype in (INT8, FP8)}
        assert errors[coarser] > 2 * errors[finer]


@pytest.mark.parametrize("dtype", GREATEST)
def test_what_is_no_number_comes_back_as_none(dtype: torch.dtype) -> None:
    x = torch.ones(3, 4)
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    found, _ = came_back(x, dtype)
    assert found.isfinite().any(1).tolist() == [False, False, True]


def test_all_fp8_numbers_are_read_as_torch_reads_them() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 4, 32)
    found = Storage(numbers, torch.ones(2, 4)).read(torch.float32)
    torch.testing.assert_close(found, numbers.float(), rtol=0, atol=0, equal_nan=True)
    assert found.isnan().sum() == 2


@needs_triton
def test_the_kernel_interpreted_writes_the_bits_of_the_formula() -> None:
    interpret(f"{__name__}.compare_kernel('cpu', __import__('torch').int8)")


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kept_in", GREATEST)
def test_the_kernel_writes_the_bits_of_the_formula(kept_in: torch.dtype) -> None:
    if kept_in == FP8 and not multiplies_fp8(torch.device("cuda")):
        pytest.skip("needs a device that knows fp8 numbers")
    compare_kernel("cuda", kept_in)


def compare_kernel(device: str, kept_in: torch.dtype) -> None:
    """Heads of whole and odd widths, views of something larger, some of them no numbers.

    Not fp8 in triton 3.6's interpreter, which loses a carry when it rounds to it.
    """
    from puna.generate.engine.storage_kernel import write_rounded

    for dtype, width in ((torch.float32, 64), (torch.float16, 24), (torch.bfloat16, 64)):
        x = heads_of_all_sizes()[:, :width].view(12, 3, width).to(dtype)[:, ::2]
        x[3, 0, 5], x[4, 1, 0] = float("nan"), float("inf")
        slots = torch.randperm(20, generator=torch.Generator().manual_seed(0))[: len(x)]
        expected, found = (Storage.empty((20, 2, width), kept_in, torch.device(kind)) for kind in ("cpu", device))
        expected.zero()
        found.zero()
        expected.write(slots, x)
        write_rounded(x.to(device), slots.to(device), found.numbers, found.scales, GREATEST[kept_in])
        assert found.scales is not None
        torch.testing.assert_close(found.scales.cpu(), expected.scales, rtol=0, atol=0, equal_nan=True)
        are_numbers = expected.scales.isfinite()
        assert are_numbers.sum() > 10
        assert torch.equal(found.numbers.cpu().view(INT8)[are_numbers], expected.numbers.view(INT8)[are_numbers])
        ours, plain = (storage.read(torch.float32).cpu() for storage in (found, expected))
        assert torch.equal(ours.isfinite(), plain.isfinite())  # an infinity divided by itself is any code at all
        assert torch.equal(ours[ours.isfinite()], plain[plain.isfinite()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, *GREATEST])
def test_each_token_lies_in_its_slot(dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    pool = Storage.empty((4, 5, 2, 16), dtype, CPU)
    pool.zero()
    slots = torch.tensor([7, 0, 19])
    pool.flatten().write(slots, x)
    alone = Storage.empty(x.shape, dtype, CPU)
    alone.write(torch.arange(3), x)
    expected = alone.read(torch.bfloat16)
    torch.testing.assert_close(expected, x, rtol=1 / 16 + 2**-8, atol=0.02)
    assert torch.equal(pool.flatten()[slots].read(torch.bfloat16), expected)
    assert torch.equal(pool[1].read(torch.bfloat16)[2], expected[0])
    assert pool.flatten().read(torch.bfloat16).flatten(1).any(1).nonzero().flatten().tolist() == [0, 7, 19]


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_a_token_takes_a_byte_a_number_and_four_a_head(cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("codellama-34b")  # heads of 128
    assert token_bytes(config, IN_8_BITS[cache_dtype]) * 256 == 132 * token_bytes(config, torch.bfloat16)
    monkeypatch.setattr("puna.generate.engine.engine.free_memory_bytes", lambda _: 10_000_000)
    model = tiny_model(head_dim=128).bfloat16()
    plain, small = (Engine(model, draft=model, cache_dtype=name) for name in (None, cache_dtype))
    assert small.pool.n_blocks == pytest.approx(plain.pool.n_blocks * 256 / 132, abs=1)
    assert isinstance(small._drafter, DraftModel)
    for cache in (small._runner.cache, small._drafter._runner.cache):
        tokens = (small.pool.n_blocks + 1) * small.pool.size
        assert cache.keys.nbytes + cache.values.nbytes == tokens * token_bytes(model.config, cache.keys.numbers.dtype)


def test_what_there_is_not_is_refused_with_what_there_is(model: Llama) -> None:
    with pytest.raises(UsageError, match="a cache is kept in int8 or fp8, not in 'int4'; leave it out"):
        Engine(model, cache_dtype="int4")
    with pytest.raises(UsageError, match=r"mps does not know fp8 numbers .* take int8"):
        storage_dtype("fp8", torch.device("mps"))
    assert storage_dtype("int8", torch.device("mps")) == INT8
    assert storage_dtype(None, torch.device("mps")) is None


# Completions


def progressions(count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length) ids that grow by 1 to 4 at a time, and from 31 go on at 1."""
    start = torch.randint(31, (count, 1), generator=generator)
    step = torch.randint(1, 5, (count, 1), generator=generator)
    return 1 + (start + step * torch.arange(length)) % 31


@pytest.fixture(scope="module")
def counting() -> Llama:
    """A model that has learnt to go on with progressions, for which it must see two tokens."""
    model = tiny_model(vocab_size=32, initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        rows = progressions(16, 12, generator)
        logits = model(rows[:, :-1])[:, 1:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 2:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@pytest.mark.parametrize(("cache_dtype", "most"), [("int8", 0.05), ("fp8", 0.2)])
def test_a_trained_model_says_the_same_by_logits_that_differ_little(
    counting: Llama, cache_dtype: str, most: float
) -> None:
    prompts = progressions(16, 6, torch.Generator().manual_seed(5)).tolist()
    settings = Sampling(max_tokens=6, ignore_eos=True)
    engine = Engine(counting, cache_tokens=512, cache_dtype=cache_dtype)
    found: dict[int, list[Tensor]] = {}
    take = engine._take

    def note(chunk, logits) -> None:
        found.setdefault(chunk.running.sequence.index, []).append(logits.logits[0])
        take(chunk, logits)

    engine._take = note  # type: ignore[method-assign]
    completions = engine.generate(prompts, settings)
    assert completions == complete(counting, None, prompts, settings)
    differences = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        exact = counting(torch.tensor([prompt + completion.tokens]))[0, 5:-1]
        differences.append((torch.stack(found[index]) - exact).abs().max() / exact.std())
    assert 0 < max(differences) < most, "of the logits' standard deviation"


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("guessing", [{}, {"lookup": True}, {"draft": tiny_model()}], ids=["plain", "lookup", "draft"])
def test_completions_do_not_depend_on_what_else_is_in_the_batch(
    model: Llama, cache_dtype: str, guessing: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [1, *range(40, 60)]
    prompts = [shared, [5, 6, 7, 8, 5, 6], shared[:13], [1], list(range(3, 33)), shared, shared[:17]]
    samplings = [
        Sampling(max_tokens=20 - i, temperature=0.7 * (i % 2), seed=i, ignore_eos=True) for i in range(len(prompts))
    ]
    alone = [
        Engine(model, cache_tokens=128, cache_dtype=cache_dtype).generate([prompt], sampling)[0]
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    engine = Engine(
        model, cache_tokens=72, block_tokens=4, max_rows=4, step_tokens=12, cache_dtype=cache_dtype, **guessing
    )
    given_way: list[object] = []
    preempt = engine.scheduler._preempt
    monkeypatch.setattr(engine.scheduler, "_preempt", lambda running: (given_way.append(running), preempt(running)))
    assert engine.generate(prompts, samplings) == alone
    assert given_way
    assert engine.generate(prompts, samplings) == alone, "with known beginnings"
    assert engine.pool.n_free == engine.pool.n_blocks
