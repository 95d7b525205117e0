"""pass@k against counting subsets."""

from itertools import combinations
from math import comb, sqrt

import pytest

from puna.evaluate.pass_at_k import bootstrap, intervals, pass_at_k, scores


@pytest.mark.parametrize("samples", range(1, 9))
def test_it_is_the_share_of_subsets_with_one_that_passed(samples: int) -> None:
    for passed in range(samples + 1):
        verdicts = [i < passed for i in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(combinations(verdicts, k))
            assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_it_holds_for_many_samples() -> None:
    assert pass_at_k(200, 7, 100) == pytest.approx(1 - comb(193, 100) / comb(200, 100), rel=1e-12)
    assert pass_at_k(200, 0, 100) == 0
    assert pass_at_k(200, 101, 100) == 1
    assert pass_at_k(200, 1, 1) == pytest.approx(1 / 200)


@pytest.mark.parametrize("counts", [(1, 0, 0), (1, 0, 2), (1, 2, 1), (3, -1, 1), (0, 0, 1)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(*counts)


def test_a_k_is_given_only_where_every_task_has_samples_enough() -> None:
    assert scores([(1, 1), (1, 0), (1, 0), (1, 0)]) == {"pass@1": 0.25}
    assert scores([(10, 1), (9, 0)]) == {"pass@1": pytest.approx(0.05)}
    assert scores([(10, 1), (10, 0)]) == {"pass@1": pytest.approx(0.05), "pass@10": pytest.approx(0.5)}
    assert list(scores([(100, 3)])) == ["pass@1", "pass@10", "pass@100"]
    assert scores([]) == {}


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution() -> None:
    low, high = bootstrap([1.0] * 77 + [0.0] * 87)
    half = 1.96 * sqrt(77 * 87 / 164**3)
    assert (low, high) == pytest.approx((77 / 164 - half, 77 / 164 + half), abs=0.01)


def test_the_interval_of_a_mean_with_weights_is_that_of_their_ratio() -> None:
    assert bootstrap([2.0] * 5, weights=[1, 10, 100, 1000, 10_000]) == [2.0, 2.0]
    assert bootstrap([1.0] * 99 + [3.0], weights=[1] * 99 + [1e6]) == pytest.approx([1.0, 3.0], abs=0.01)
    values = [1.0, 3.0, 5.0, 7.0, 9.0]
    assert bootstrap(values, weights=[7] * 5) == pytest.approx(bootstrap(values))


def test_values_of_one_group_are_drawn_together() -> None:
    values = [1.0] * 3 + [0.0] * 5
    repeated = [value for value in values for _ in range(20)]
    groups = [str(i) for i in range(8) for _ in range(20)]
    assert bootstrap(repeated, groups=groups) == bootstrap(values)
    together, apart = bootstrap(values), bootstrap(repeated)
    assert together
    assert apart
    assert apart[0] > together[0] + 0.1


def test_few_groups_have_no_interval_however_many_values_they_have() -> None:
    values = [i / 100 for i in range(100)]
    for count in (1, 4, 5):
        found = bootstrap(values, groups=[str(i % count) for i in range(100)])
        assert (found is None) == (bootstrap(values[:count]) is None) == (count < 5)
    assert intervals([(1, 1)] * 4) == {"pass@1": None}


def test_a_share_of_0_or_1_ends_where_so_many_tasks_alike_become_unlikely() -> None:
    for groups, count in ((None, 164), ([str(i // 2) for i in range(164)], 82)):  # those of one problem count once
        none, every = (intervals([(1, passed)] * 164, groups=groups)["pass@1"] for passed in (0, 1))
        assert none
        assert every
        assert (none[0], every[1]) == (0.0, 1.0)
        assert (1 - none[1]) ** count == pytest.approx(0.025)
        assert every[0] ** count == pytest.approx(0.025)


def test_intervals_hold_their_scores_are_narrower_with_more_tasks_and_are_the_same_every_time() -> None:
    tasks = [(10, passed % 11) for passed in range(40)]
    few, many = intervals(tasks), intervals(tasks * 9)
    assert few == intervals(tasks)
    assert list(few) == list(scores(tasks)) == ["pass@1", "pass@10"]
    for name, score in scores(tasks).items():
        assert few[name][0] < many[name][0] < score < many[name][1] < few[name][1]
    assert intervals([]) == {}
