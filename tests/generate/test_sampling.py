"""How the next token is chosen, held against transformers' processors and against counted frequencies."""

import contextlib
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from puna.errors import PunaError, UsageError
from puna.generate.engine.drawing import draw
from puna.generate.sampling import GREATEST, Sampling, check_numbers, choose, distribution

V = 50


def logits_of(seed: int, width: float = 3.0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * width


def seen(ids: list[int]) -> torch.Tensor:
    is_seen = torch.zeros(V, dtype=torch.bool)
    is_seen[ids] = True
    return is_seen


def share_of(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def transformers_distribution(logits: torch.Tensor, ids: list[int], sampling: Sampling) -> torch.Tensor:
    """The processors in the order in which transformers' `generate` lists them."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(torch.tensor([ids], dtype=torch.long), logits[None].clone())[0].softmax(-1)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=8),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    penalty=st.floats(0.5, 2),
)
def test_the_distribution_is_transformers(
    seed: int, ids: list[int], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    logits = logits_of(seed)
    ours = distribution(logits, seen(ids), sampling)
    torch.testing.assert_close(ours, transformers_distribution(logits, ids, sampling), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings_", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.49}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.31}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.6, "top_k": 2}, [0]),  # 0.5 is already 0.625 of the two that top-k left
    ],
)
def test_what_is_kept_of_a_distribution_that_one_can_read(settings_: dict, kept: list[int]) -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    ours = distribution(shares.log(), torch.zeros(4, dtype=torch.bool), Sampling(temperature=1.0, **settings_))
    assert ours.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(ours[kept], shares[kept] / shares[kept].sum())


@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 8},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.3},
    ],
)
def test_tokens_come_as_often_as_the_distribution_says(settings_: dict) -> None:
    sampling, logits, draws = Sampling(**settings_), logits_of(7, width=1.5), 6_000
    is_seen = seen([3, 4, 5])
    expected = distribution(logits, is_seen, sampling).double()
    generator = torch.Generator().manual_seed(11)
    counts = torch.zeros(V, dtype=torch.float64)
    for _ in range(draws):
        counts[choose(logits, is_seen, sampling, share_of(generator))] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    squares = ((counts - draws * expected) ** 2 / (draws * expected))[possible].sum().item()
    freedom = int(possible.sum()) - 1
    assert squares < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations of chi-square
    uniform = ((counts[possible] - draws / (freedom + 1)) ** 2 / (draws / (freedom + 1))).sum().item()
    assert uniform > 10 * freedom, "the draws would also pass for another distribution"


@pytest.mark.parametrize("share", [0.0, 0.99])
def test_temperature_zero_takes_the_likeliest_after_the_penalty_whatever_is_drawn(share: float) -> None:
    logits = torch.tensor([1.0, 4.0, 3.9, -5.0])
    none, second = torch.zeros(4, dtype=torch.bool), torch.tensor([False, True, False, False])
    assert choose(logits, none, Sampling(), share) == 1
    assert choose(logits, second, Sampling(repetition_penalty=1.2), share) == 2


def test_a_tiny_temperature_is_greedy_and_not_a_number_out_of_range() -> None:
    logits = logits_of(1, width=1e4)
    for temperature in (1e-6, 1e-30, 1e-44, 5e-324):
        sampling = Sampling(temperature=temperature)
        assert choose(logits, seen([]), sampling, 0.7) == int(logits.argmax())
        assert draw(logits[None], [sampling], [0.7]) == [int(logits.argmax())]


def test_ruled_out_tokens_are_never_chosen() -> None:
    logits = torch.full((V,), -math.inf)
    logits[[0, 20, V - 2]] = 0.0
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=5.0, top_p=0.999)
    drawn = {choose(logits, seen([]), sampling, share_of(generator)) for _ in range(300)}
    assert drawn == {0, 20, V - 2}


@pytest.mark.parametrize(("share", "token"), [(0.0, 20), (0.4999, 20), (0.5001, V - 2), (1 - 2**-53, V - 2)])
def test_the_ends_of_the_unit_interval_fall_on_possible_tokens(share: float, token: int) -> None:
    logits = torch.full((V,), -math.inf)
    logits[[20, V - 2]] = 0.0
    assert choose(logits, seen([]), Sampling(temperature=1.0), share) == token
    assert draw(logits[None], [Sampling(temperature=1.0)], [share]) == [token]


@settings(max_examples=100, deadline=None, derandomize=True)  # a share on the edge of a token may fall to the next
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0, 1, exclude_max=True),
    samplings=st.lists(
        st.builds(
            Sampling,
            temperature=st.floats(0.1, 3),
            top_k=st.integers(0, 60),
            top_p=st.one_of(st.just(1.0), st.floats(0.05, 1)),
            min_p=st.one_of(st.just(0.0), st.floats(0, 0.9)),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_rows_are_drawn_together_as_one_by_one(seed: int, share: float, samplings: list[Sampling]) -> None:
    rows = torch.stack([logits_of(seed + number) for number in range(len(samplings))])
    shares = [(share + number / 8) % 1 for number in range(len(samplings))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puna.generate.engine.drawing.MOST_ROWS", 3)
        found = draw(rows, samplings, shares)
    assert found == [choose(row, seen([]), *each) for row, *each in zip(rows, samplings, shares, strict=True)]


def test_of_tokens_alike_top_p_keeps_the_same_ones_together_as_one_by_one() -> None:
    """In bf16 many are alike; those of the first ids go."""
    rows = torch.zeros(3, 2000)
    rows[1:, ::7] = 1.5
    samplings = [Sampling(temperature=0.8, top_p=top_p) for top_p in (0.01, 0.02, 0.3)]
    for share in (0.0, 0.4, 0.99):
        found = draw(rows, samplings, [share] * 3)
        assert found == [choose(row, rows[0] > 0, each, share) for row, each in zip(rows, samplings, strict=True)]
        assert found[0] > 1970


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_an_error_not_a_token(number: float) -> None:
    logits = logits_of(0)
    check_numbers(logits)
    logits[3] = number
    with pytest.raises(PunaError, match="not numbers"):
        check_numbers(logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("presence_penalty", 1e300),
        ("frequency_penalty", -(10**400)),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e300),
        ("logit_bias", {5: 1e300}),
        ("logprobs", True),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("seed", -1),
        ("stop", ("",)),
        ("stop", ("x", 3)),
        ("stop_ids", ("x",)),
        ("temperature", None),
        ("top_k", 2.5),
        ("max_tokens", "9"),
        ("logit_bias", {5: None}),
        ("stop", 5),
        ("stop_ids", 5),
        ("stop_ids", (-5,)),
        ("ignore_eos", "no"),
        ("seed", True),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value_and_range(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^{field}=.* must be "):
        Sampling(**{field: value})


@pytest.mark.parametrize("field", [each.name for each in dataclasses.fields(Sampling)])
@pytest.mark.parametrize("value", [None, 5, 1.5, "x", b"x", [None], {"a": 1}, True, object()])
def test_a_setting_of_any_kind_is_taken_or_refused_in_words(field: str, value: object) -> None:
    with contextlib.suppress(UsageError):
        Sampling(**{field: value})


def test_stop_strings_are_given_as_several_as_one_or_not_at_all() -> None:
    assert [Sampling(stop=stop).stop for stop in (["a", "b"], "ab", [], None)] == [("a", "b"), ("ab",), (), ()]
    assert [Sampling(stop_ids=ids).stop_ids for ids in ([5, 6], None)] == [(5, 6), ()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_greatest_penalties_and_biases_leave_numbers(temperature: float, sign: int) -> None:
    logits, counts = logits_of(0), torch.zeros(V)
    counts[[3, 4]] = 1e5
    settings = Sampling(
        temperature=temperature,
        presence_penalty=sign * GREATEST,
        frequency_penalty=sign * GREATEST,
        repetition_penalty=GREATEST**sign,
        logit_bias={3: sign * GREATEST, 5: -sign * GREATEST},
    )
    id = choose(logits, seen([3, 4, 5]), settings, 0.5, counts)
    assert id == 5 if sign < 0 else id in set(range(V)) - {3, 4, 5}


def test_an_unknown_setting_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"called temprature; there are temperature, top_k"):
        Sampling.of({"temprature": 1.0})


def test_one_stop_string_may_be_given_bare() -> None:
    assert Sampling(stop="\n\n") == Sampling(stop=("\n\n",)) == Sampling(stop=["\n\n"])  # type: ignore[arg-type]


def test_penalties_count_what_the_completion_holds_and_a_bias_is_added() -> None:
    """Against OpenAI's published formula: mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence."""
    logits, counts = logits_of(3), torch.zeros(V)
    counts[[4, 7]] = torch.tensor([1.0, 3.0])
    settings = Sampling(temperature=1.0, presence_penalty=0.7, frequency_penalty=0.4, logit_bias={2: 1.5, 7: -2.0})
    expected = logits.clone()
    expected[2] += 1.5
    expected[7] += -2.0 - 3 * 0.4 - 0.7
    expected[4] += -0.4 - 0.7
    torch.testing.assert_close(distribution(logits, seen([]), settings, counts), expected.softmax(0))
    greedy = Sampling(logit_bias={11: 100.0})
    assert choose(logits, seen([]), greedy, 0.5) == 11


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_choosing_leaves_the_logits_as_they_are(temperature: float) -> None:
    """They are asked for log-probabilities afterwards."""
    logits, counts = logits_of(3), torch.ones(V)
    before = logits.clone()
    how = Sampling(temperature=temperature, logit_bias={3: 5.0}, repetition_penalty=1.3, presence_penalty=0.5, top_k=5)
    choose(logits, seen([1, 2]), how, 0.5, counts)
    assert torch.equal(logits, before)
