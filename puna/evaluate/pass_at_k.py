"""pass@k: the chance that at least one of k samples passes, estimated without bias from n ≥ k of them.

Source: Evaluating Large Language Models Trained on Code (arXiv:2107.03374), section 2.1.
"""

from collections.abc import Iterable, Sequence

import numpy as np

#: The k that results are given for, as far as there are samples enough.
KS = (1, 10, 100)

#: How many sets of tasks are drawn for an interval, and the share of their means that lies within it.
RESAMPLES = 2_000
CONFIDENCE = 0.95

#: With fewer groups there is no interval: few sets can be drawn of them, and of a single one only itself.
FEWEST_GROUPS = 5


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The share of the k-element subsets of a task's samples that hold one that passed: 1 - C(n-c, k) / C(n, k).

    Args:
        samples: n, how many samples the task has.
        passed: c, how many of them passed.
        k: size of the subsets.

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 0 <= passed <= samples and 1 <= k <= samples, not {passed=}, {samples=}, {k=}")
    none_passed = 1.0
    for i in range(samples - passed + 1, samples + 1):
        none_passed *= max(0.0, 1 - k / i)
    return 1 - none_passed


def by_task(tasks: Iterable[tuple[int, int]]) -> dict[str, list[float]]:
    """The pass@k of every task, in their order, for every k of `KS` that all tasks have samples enough for."""
    counts = list(tasks)
    fewest = min((samples for samples, _ in counts), default=0)
    return {f"pass@{k}": [pass_at_k(*task, k) for task in counts] for k in KS if k <= fewest}


def scores(tasks: Iterable[tuple[int, int]]) -> dict[str, float]:
    """The mean pass@k over tasks, each (samples, passed), for every k of `KS` that all tasks have samples enough for.

    Returns:
        `{"pass@1": …, "pass@10": …}`.
    """
    return {name: sum(values) / len(values) for name, values in by_task(tasks).items()}


def intervals(
    tasks: Iterable[tuple[int, int]], *, groups: Sequence[str] | None = None
) -> dict[str, list[float] | None]:
    """Between which values each of `scores` would lie for 95 of 100 sets of such tasks: `share_interval`.

    Tasks are drawn with replacement, those of one of `groups` together; what is drawn depends on their number alone.

    Returns:
        `{"pass@1": [low, high], …}`; None in place of an interval where there are too few groups.
    """
    return {name: share_interval(values, groups=groups) for name, values in by_task(tasks).items()}


def share_interval(values: Sequence[float], *, groups: Sequence[str] | None = None) -> list[float] | None:
    """`bootstrap` of values from 0 to 1; where all groups are 0, or all 1, the interval of Clopper and Pearson.

    Sets that are drawn of equal values are equal, though other tasks than these might well have differed.
    """
    interval = bootstrap(values, groups=groups)
    if interval not in ([0.0, 0.0], [1.0, 1.0]):
        return interval
    width = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(values if groups is None else set(groups)))
    return [0.0, width] if values[0] == 0 else [1 - width, 1.0]


def bootstrap(
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    groups: Sequence[str] | None = None,
) -> list[float] | None:
    """The percentile interval [low, high] of a mean; None: there are fewer groups than `FEWEST_GROUPS`.

    Args:
        values: one a task.
        weights: of the values in the mean, above 0; equal by default.
        groups: what each value is of, e.g. the document of a line: values of one group are alike for more reasons than
            the model, so they are drawn together; by default each is a group.
    """
    shares = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    sums = shares * np.asarray(values, dtype=float)
    if groups is not None:
        _, group_of = np.unique(groups, return_inverse=True)
        sums, shares = np.bincount(group_of, sums), np.bincount(group_of, shares)
    count = len(sums)
    if count < FEWEST_GROUPS:
        return None
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    means = (drawn @ sums) / (drawn @ shares)
    tail = (1 - CONFIDENCE) / 2
    return [float(value) for value in np.quantile(means, (tail, 1 - tail))]
