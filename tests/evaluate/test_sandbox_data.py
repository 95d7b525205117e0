"""Data that crosses between the sandboxes: every plain value, and nothing else."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.inside.data import DEPTH, NotDataError, decode, encode

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters()),
    st.binary(),
    st.fractions(),
    st.decimals(allow_nan=False),
)
HASHABLE = st.recursive(
    SCALARS, lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3)), max_leaves=5
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner, inner),
        st.sets(HASHABLE, max_size=4),
        st.dictionaries(HASHABLE, inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(VALUES)
def test_a_value_arrives_as_it_was_with_the_types_it_had(value: Any) -> None:
    assert as_text(decode(encode(value))) == as_text(value)


@settings(deadline=None)
@given(st.binary())
def test_bytes_are_a_value_or_are_refused(message: bytes) -> None:
    try:
        value = decode(message)
    except NotDataError:
        return
    assert as_text(decode(encode(value))) == as_text(value)


@settings(deadline=None)
@given(VALUES, st.data())
def test_a_message_that_is_cut_off_is_refused(value: Any, data: st.DataObject) -> None:
    message = encode(value)
    with pytest.raises(NotDataError):
        decode(message[: data.draw(st.integers(0, len(message) - 1))])


NO_VALUES = [
    *(
        b"",
        b"x0:",
        b"NN",
        b"i",
        b"i1:",
        b"i1:g",
        b"i-1:",
        b"i99999999999999:1",
        b"d1:x",
        b"c1:1",
        b"s1:\xff",
        b"D1:x",
        b"Q3:1/0",
    ),
    *(b"l1:", b"l2:N", b"l99999999:", b"e1:l0:", b"m1:N", b"r0:", b"l1:" * 200 + b"N"),
]


@pytest.mark.parametrize("message", NO_VALUES)
def test_what_is_no_value_is_refused(message: bytes) -> None:
    with pytest.raises(NotDataError):
        decode(message)


@pytest.mark.parametrize("value", [object(), print, object, ValueError("x"), [object()], {"a": {1: print}}])
def test_what_is_not_plain_data_does_not_cross_and_the_message_says_what_it_is(value: Any) -> None:
    with pytest.raises(
        NotDataError, match=r"a (object|builtin_function_or_method|type|ValueError), which is not plain data"
    ):
        encode(value)


def test_nesting_has_an_end() -> None:
    value: Any = 1
    for _ in range(DEPTH - 1):
        value = [value]
    assert decode(encode(value)) == value
    with pytest.raises(NotDataError, match=f"nested deeper than {DEPTH}"):
        encode([value])


def as_text(value: Any) -> str:
    """A spelling that tells 1 from True and 1.0, 0.0 from -0.0, and finds nan equal to nan."""
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({','.join(map(as_text, value))})"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({','.join(sorted(map(as_text, value)))})"
    if isinstance(value, dict):
        return f"dict({','.join(sorted(f'{as_text(key)}:{as_text(item)}' for key, item in value.items()))})"
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return f"{type(value).__name__} {value!r}"
