import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.data.documents import Document
from puna.data.infilling import cut_for_infilling
from puna.data.units import is_held_out

RATES = {"fim_rate": 0.9, "spm_rate": 0.5}


@given(st.text(), st.text(), st.integers())
def test_prefix_middle_and_suffix_are_the_document(text, id, seed):
    cut = cut_for_infilling(text, seed=seed, id=id, fim_rate=1.0, spm_rate=0.5)
    assert cut is not None
    assert cut.prefix + cut.middle + cut.suffix == text


@given(st.text(), st.text(), st.integers())
def test_a_cut_is_a_function_of_seed_and_id(text, id, seed):
    assert cut_for_infilling(text, seed=seed, id=id, **RATES) == cut_for_infilling(text, seed=seed, id=id, **RATES)


def test_nine_tenths_are_cut_and_half_of_them_have_the_suffix_first():
    cuts = [cut_for_infilling("text", seed=0, id=f"file-{i}", **RATES) for i in range(20_000)]
    made = [cut for cut in cuts if cut is not None]
    assert len(made) / len(cuts) == pytest.approx(0.9, abs=0.01)
    assert sum(cut.order == "spm" for cut in made) / len(made) == pytest.approx(0.5, abs=0.015)


def test_both_ends_fall_on_every_place_between_characters_alike():
    cuts = [cut_for_infilling("abcd", seed=0, id=str(i), fim_rate=1.0, spm_rate=0.5) for i in range(25_000)]
    pairs = [(len(cut.prefix), len(cut.prefix) + len(cut.middle)) for cut in cuts if cut is not None]
    for start in range(5):
        for stop in range(start, 5):
            expected = 1 / 25 if start == stop else 2 / 25  # two independent draws of five places, sorted
            assert pairs.count((start, stop)) / len(pairs) == pytest.approx(expected, abs=0.01)


def test_another_seed_cuts_elsewhere():
    first, second = (cut_for_infilling("x" * 1000, seed=seed, id="a", fim_rate=1, spm_rate=0) for seed in (0, 1))
    assert first != second


def test_rate_zero_cuts_nothing_and_rate_one_everything():
    assert all(cut_for_infilling("ab", seed=0, id=str(i), fim_rate=0.0, spm_rate=0.5) is None for i in range(500))
    assert all(cut_for_infilling("ab", seed=0, id=str(i), fim_rate=1.0, spm_rate=0.5) for i in range(500))


def test_the_share_that_is_held_out_is_as_asked_and_does_not_hang_on_the_cuts():
    ids = [f"src/file_{i}.py" for i in range(20_000)]
    held_out = [id for id in ids if is_file_held_out(id, 0.1)]
    assert len(held_out) / len(ids) == pytest.approx(0.1, abs=0.01)
    cut = [id for id in held_out if cut_for_infilling("text", seed=0, id=id, fim_rate=0.5, spm_rate=0.5)]
    assert len(cut) / len(held_out) == pytest.approx(0.5, abs=0.05)


def test_a_larger_share_holds_out_the_same_documents_and_more():
    ids = [str(i) for i in range(1000)]
    assert {id for id in ids if is_file_held_out(id, 0.1)} < {id for id in ids if is_file_held_out(id, 0.2)}


def is_file_held_out(id: str, share: float) -> bool:
    return is_held_out(Document(id, "src", text=""), "code", share)
