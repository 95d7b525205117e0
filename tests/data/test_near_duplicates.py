import builtins
import random

import numpy as np
import pytest

from puna.data.near_duplicates import _empty_minhash, near_copies, sketch
from puna.errors import PunaError

pytest.importorskip("datasketch")


def words(count: int, seed: int) -> list[str]:
    return [f"w{random.Random(f'{seed} {i}').randrange(10_000)}" for i in range(count)]


def overlap(a: list[str], b: list[str]) -> float:
    """Jaccard of the sets of runs of five words, counted."""
    first, second = ({tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (a, b))
    return len(first & second) / len(first | second)


def sketches(*texts: list[str]):
    return list(enumerate(sketch(" ".join(text)) for text in texts))


@pytest.mark.parametrize("changed", [10, 100, 300])
def test_sketches_agree_as_much_as_the_texts_overlap(changed):
    a = words(1000, seed=1)
    b = words(changed, seed=2) + a[changed:]
    (_, first), (_, second) = sketches(a, b)
    assert np.mean(first == second) == pytest.approx(overlap(a, b), abs=0.12)


def test_a_long_text_is_sketched_in_batches_with_the_same_result(monkeypatch):
    text = words(3000, seed=3)
    whole = sketches(text)[0][1]
    monkeypatch.setattr("puna.data.near_duplicates._RUNS_AT_ONCE", 100)
    assert (sketches(text)[0][1] == whole).all()


def test_the_first_of_near_copies_stays():
    original, other = words(500, seed=4), words(500, seed=5)
    copy = ["licence", "header", *original]
    assert list(near_copies(sketches(original, other, copy, original))) == [(2, 0), (3, 0)]


def test_texts_that_share_half_are_no_copies():
    a = words(500, seed=6)
    assert list(near_copies(sketches(a, a[:250] + words(250, seed=7)))) == []


def test_texts_shorter_than_a_run_are_compared_too():
    assert list(near_copies(sketches(["a", "b"], ["a", "b"], ["c"]))) == [(1, 0)]


def test_without_datasketch_the_message_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **settings):
        if name == "datasketch":
            raise ImportError(name)
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    _empty_minhash.cache_clear()
    with pytest.raises(PunaError, match=r"pip install datasketch"):
        sketch("x")
