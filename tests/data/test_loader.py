"""The loader's batches follow from the step alone, hold every row once an epoch, and mix sources by weight."""

import math
from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data.loader import LONGEST_PERIOD, Batch, Loader, Mixture, shuffled, stack
from puna.data.rows import IGNORE, EndToEndRows, Rows, WholeDocumentRows
from puna.errors import PunaError, UsageError
from puna.testing import FakeDataset

T = 4


def rows_of(count: int, first_token: int = 1) -> Rows:
    """`count` rows whose tokens are numbered from `first_token`."""
    return EndToEndRows(FakeDataset([range(first_token, first_token + count * T)]), T)


def first_tokens(batch: Batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


def test_the_example_of_the_docstring_stays_as_it_is_so_that_old_runs_resume():
    loader = Loader([(rows_of(5), 3), (rows_of(4), 1)], batch_rows=4, seed=0)
    assert loader.row_numbers(0) == [(0, 0), (0, 4), (0, 3), (1, 0)]
    assert loader.row_numbers(1) == [(0, 2), (0, 1), (0, 1), (1, 1)]


def test_a_batch_is_its_rows_above_each_other():
    documents = FakeDataset([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]])
    rows = EndToEndRows(documents, T)
    loader = Loader([(rows, 1)], batch_rows=3, seed=7)
    batch = loader.batch(0)
    numbers = [row for _, row in loader.row_numbers(0)]
    assert sorted(numbers) == [0, 1, 2]
    for name in ("tokens", "targets", "documents", "positions"):
        field = getattr(batch, name)
        assert field.dtype == np.int32
        assert field.tolist() == [getattr(rows[i], name).tolist() for i in numbers]
    assert (batch.targets == IGNORE).any()
    assert stack(rows[i] for i in numbers).tokens.tolist() == batch.tokens.tolist()


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**40))
def test_every_epoch_holds_every_row_once(n_rows, batch_rows, seed):
    loader = Loader([(rows_of(n_rows), 1.0)], batch_rows=batch_rows, seed=seed)
    steps = -(-3 * n_rows // batch_rows)
    stream = [row for step in range(steps) for _, row in loader.row_numbers(step)]
    for epoch in range(3):
        assert sorted(stream[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def test_epochs_and_seeds_and_sources_have_orders_of_their_own():
    def epoch(seed: int, epoch: int, source: int = 0) -> list[int]:
        loader = Loader([(rows_of(50), 1), (rows_of(50), 1)], batch_rows=100, seed=seed)
        return [row for number, row in loader.row_numbers(epoch) if number == source]

    orders = [epoch(0, 0), epoch(0, 1), epoch(0, 2), epoch(1, 0), epoch(1, 1), epoch(0, 0, source=1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert epoch(0, 1) == orders[1]


def test_a_batch_does_not_depend_on_what_was_asked_before():
    sources = [(rows_of(7), 2), (rows_of(3, 1000), 1)]
    in_order = Loader(sources, batch_rows=3, seed=5)
    batches = [first_tokens(in_order.batch(step)) for step in range(40)]
    for step in (39, 3, 17, 0):
        assert first_tokens(in_order.batch(step)) == batches[step]
        assert first_tokens(Loader(sources, batch_rows=3, seed=5).batch(step)) == batches[step]
    assert len({tuple(batch) for batch in batches}) > 20


def test_a_place_far_into_a_run_costs_no_more_than_the_start():
    loader = Loader([(rows_of(1000), 0.9), (rows_of(77), 0.1)], batch_rows=8, seed=1)
    step = 10**12
    assert loader.batch(step).tokens.shape == (8, T)
    sources, before = Mixture([0.9, 0.1]).at(np.array([8 * step]))
    assert before.tolist() == [8 * step * [9, 1][sources[0]] // 10]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_any_number_of_ranks_sees_the_same_global_batches(world_size):
    loader = Loader([(rows_of(30), 0.7), (rows_of(20, 1000), 0.3)], batch_rows=12, seed=3)
    for step in (0, 5, 1234):
        parts = [loader.batch(step, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {part.tokens.shape for part in parts} == {(12 // world_size, T)}
        for name in ("tokens", "targets", "documents", "positions"):
            whole = np.concatenate([getattr(part, name) for part in parts])
            assert whole.tolist() == getattr(loader.batch(step), name).tolist()


@pytest.mark.parametrize(
    ("batch_rows", "world_size", "message"),
    [
        (8, 3, "8 rows cannot be shared evenly by 3 ranks; take 6 or 9 rows, or one of 1, 2, 4, 8 ranks"),
        (2, 3, "2 rows cannot be shared evenly by 3 ranks; take 3 rows, or one of 1, 2 ranks"),
    ],
)
def test_ranks_that_cannot_share_a_batch_are_told_what_would_do(batch_rows, world_size, message):
    loader = Loader([(rows_of(5), 1)], batch_rows=batch_rows, seed=0)
    with pytest.raises(UsageError, match=message):
        loader.batch(0, rank=0, world_size=world_size)


@settings(max_examples=12)
@given(st.lists(st.one_of(st.integers(1, 20), st.floats(0.05, 1.0)), min_size=1, max_size=6), st.integers(0, 10**9))
def test_each_source_is_less_than_a_row_from_its_share_at_every_place(weights, far):
    mixture = Mixture(weights)
    total = sum(Fraction(str(float(weight))) for weight in weights)
    shares = [Fraction(str(float(weight))) / total for weight in weights]
    period_is_short = math.lcm(*(share.denominator for share in shares)) <= LONGEST_PERIOD
    for start in (0, far):
        places = np.arange(start, start + 500)
        rounding = 0 if period_is_short else (start + 500) / LONGEST_PERIOD
        sources, before = mixture.at(places)
        for source, share in enumerate(shares):
            here = sources == source
            assert (np.diff(before[here]) == 1).all()
            for place, n in zip(places[here].tolist(), before[here].tolist(), strict=True):  # furthest off at its turns
                assert abs(n - share * place) < 1 + rounding
                assert abs(n + 1 - share * (place + 1)) < 1 + rounding


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8), st.integers(0, 10**9))
def test_whole_number_weights_are_kept_exactly(weights, periods):
    mixture = Mixture(weights)
    sources, before = mixture.at(np.arange(sum(weights)) + periods * sum(weights))
    assert np.bincount(sources).tolist() == weights
    assert [before[sources == source].min() for source in range(len(weights))] == [periods * n for n in weights]


def test_weights_are_relative():
    places = np.arange(100)
    assert Mixture([0.9, 0.1]).at(places)[0].tolist() == Mixture([9, 1]).at(places)[0].tolist()
    assert Counter(Mixture([0.9, 0.1]).at(places)[0].tolist()) == {0: 90, 1: 10}
    assert Counter(Mixture([1e-3, 3e-3]).at(places)[0].tolist()) == {0: 25, 1: 75}


@given(st.integers(1, 3000), st.integers(0, 2**32), st.integers(0, 99))
def test_an_order_is_a_permutation(length, seed, epoch):
    order = shuffled(np.arange(length), length, (seed, epoch))
    assert sorted(order.tolist()) == list(range(length))


def test_an_order_can_be_asked_in_pieces_of_any_size_and_of_any_length():
    order = shuffled(np.arange(1000), 1000, (3, 1))
    assert [int(shuffled(np.array([i]), 1000, (3, 1))[0]) for i in (0, 1, 999)] == order[[0, 1, 999]].tolist()
    huge = 10**15 + 7
    places = np.arange(huge - 1000, huge)
    numbers = shuffled(places, huge, (0,))
    assert len(np.unique(numbers)) == 1000
    assert 0 <= numbers.min() < huge / 100 < 0.99 * huge < numbers.max() < huge


@pytest.mark.parametrize(("length", "n_draws"), [(3, 200), (6, 2000)])
def test_every_order_of_a_few_rows_comes_up_equally_often(length, n_draws):
    drawn = Counter(tuple(shuffled(np.arange(length), length, (seed, 0)).tolist()) for seed in range(n_draws))
    expected = n_draws / math.factorial(length)
    counts = np.array([drawn[order] for order in permutations(range(length))])
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)


def test_an_order_of_many_rows_looks_like_chance():
    n = 100_000
    order = shuffled(np.arange(n), n, (0, 0))
    limit = 4 / math.sqrt(n)  # four standard deviations of a correlation of independent numbers
    for lag in (1, 2, 3, 17, math.isqrt(n), math.isqrt(n) + 1):
        assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < limit
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < limit
    assert (order == np.arange(n)).sum() <= 8  # about 1 row stays in its place, and about 1 pair together
    assert (np.diff(order) == 1).sum() <= 8
    by_decile = np.bincount(order // (n // 10) * 10 + np.arange(n) // (n // 10), minlength=100)
    assert ((by_decile - n / 100) ** 2 / (n / 100)).sum() < 81 + 4 * math.sqrt(2 * 81)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no data to load"),
        ([(rows_of(3), 0.0)], r"weight 0\.0; weights are above 0"),
        ([(rows_of(3), -1), (rows_of(3), 2)], "weight -1; weights are above 0"),
        ([(rows_of(3), math.nan)], "weight nan"),
        ([(rows_of(3), 1.0), (rows_of(3), 1e-7)], r"weight 1e-07 of 1\.0000001, less than one row in 65,536"),
    ],
)
def test_unusable_mixtures_are_refused(sources, message):
    with pytest.raises(UsageError, match=message):
        Loader(sources, batch_rows=2, seed=0)


def test_sources_without_rows_or_with_other_row_lengths_are_refused():
    with pytest.raises(PunaError, match="data set 1 of 2 has no rows"):
        Loader([(rows_of(3), 1), ([], 1)], batch_rows=2, seed=0)
    longer = WholeDocumentRows(FakeDataset([[1, 2]]), 2 * T)
    with pytest.raises(PunaError, match=r"rows of \[4, 8\] tokens; open them with one sequence_length"):
        Loader([(rows_of(3), 1), (longer, 1)], batch_rows=2, seed=0)


def test_wrong_numbers_are_refused():
    with pytest.raises(UsageError, match="batch_rows is 0"):
        Loader([(rows_of(3), 1)], batch_rows=0, seed=0)
    with pytest.raises(UsageError, match="seed is -1"):
        Loader([(rows_of(3), 1)], batch_rows=1, seed=-1)
    loader = Loader([(rows_of(3), 1)], batch_rows=2, seed=0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader.batch(0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="step -1"):
        loader.batch(-1)
