"""Bulk encoding: the ids of plain encoding, faster, in bounded memory."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import PunaError
from puna.tokenizer import BulkEncoder, bulk, load_tokenizer
from puna.tokenizer.sentence_piece import NORMAL, USER_DEFINED, read_model

FRAGMENTS = [
    "def ", "return x", "self.value(", "):", "\n", "\n\n", "\r\n", " ", "    ", "\t", "\u2581", "\0", "é", "naïve",
    "».", "👩", "12", "x1y2", "'s", "__init__", "<s>", " <PRE>", "\x7f", "a" * 40,
]  # fmt: skip
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
texts = st.lists(st.sampled_from(FRAGMENTS) | any_text, max_size=30).map("".join)


@pytest.fixture(scope="module")
def small_bulk(small_tokenizer):
    return BulkEncoder(small_tokenizer)


@pytest.fixture(scope="module")
def llama_bulk(code_llama_tokenizer):
    return BulkEncoder(code_llama_tokenizer)


@settings(max_examples=100, deadline=None)
@given(text=texts, leading_space=st.booleans())
def test_bulk_ids_are_plain_ids_in_a_small_vocabulary(small_bulk, text, leading_space):
    assert small_bulk.remembers
    ids = small_bulk.encode(text, leading_space=leading_space)
    assert ids.dtype == np.int32
    assert ids.tolist() == small_bulk.tokenizer.encode(text, leading_space=leading_space)


@settings(max_examples=100, deadline=None)
@given(text=texts, leading_space=st.booleans())
def test_bulk_ids_are_plain_ids_in_llamas_vocabulary(llama_bulk, text, leading_space):
    assert llama_bulk.remembers
    ids = llama_bulk.encode(text, leading_space=leading_space)
    assert ids.tolist() == llama_bulk.tokenizer.encode(text, leading_space=leading_space)


@settings(max_examples=50, deadline=None)
@given(several=st.lists(texts, max_size=6), leading_space=st.booleans())
def test_many_texts_at_once_have_the_ids_of_each(llama_bulk, several, leading_space):
    ids = llama_bulk.encode_all(several, leading_space=leading_space)
    assert [row.tolist() for row in ids] == [
        llama_bulk.tokenizer.encode(text, leading_space=leading_space) for text in several
    ]


def test_half_a_surrogate_pair_among_many_texts_is_refused(llama_bulk):
    with pytest.raises(PunaError, match="half of a surrogate pair"):
        llama_bulk.encode_all(["fine", "\ud800"])


def test_bulk_ids_of_real_code_are_plain_ids(llama_bulk):
    library = Path(os.__file__).parent
    for name in ("argparse.py", "ast.py", "test/test_unicode_identifiers.py", "encodings/cp1251.py", "typing.py"):
        if (library / name).is_file():
            text = (library / name).read_text(encoding="utf-8")
            assert llama_bulk.encode(text).tolist() == llama_bulk.tokenizer.encode(text), name


def test_words_with_accents_are_not_cut_at_them(llama_bulk):
    ids = llama_bulk.encode("für xción a»).")
    assert [llama_bulk.tokenizer.piece(id) for id in ids] == ["▁für", "▁x", "ción", "▁a", "»)."]


@pytest.mark.parametrize("forbidding", ["x▁y", "▁▁x▁", "\nx", "a\nb"])
def test_a_vocabulary_with_a_piece_across_a_cut_is_not_cut(small_tokenizer, tmp_path, forbidding):
    encoder = BulkEncoder(_with_piece(small_tokenizer, tmp_path, forbidding, NORMAL))
    assert not encoder.remembers
    text = "x y\nx  x a\nb"
    assert encoder.encode(text).tolist() == encoder.tokenizer.encode(text)


def test_a_piece_of_letters_and_signs_only_stops_the_finer_cut(small_tokenizer, tmp_path):
    tokenizer = _with_piece(small_tokenizer, tmp_path, "x(", NORMAL, score=1.0)
    encoder = BulkEncoder(tokenizer)
    assert encoder.remembers
    assert tokenizer.id_of("x(") in encoder.encode("f x(y)")
    assert encoder.encode("f x(y)").tolist() == tokenizer.encode("f x(y)")


def test_vocabularies_trained_as_llamas_allow_the_finer_cut(small_bulk, llama_bulk):
    for encoder in (small_bulk, llama_bulk):
        encoder.encode("finer(cut)")
        assert {" finer", "(", "cut", ")"} <= encoder._memory._rows.keys()


def test_a_vocabulary_that_does_more_than_merge_is_not_cut(small_tokenizer, tmp_path):
    assert not BulkEncoder(_with_piece(small_tokenizer, tmp_path, "whole", USER_DEFINED)).remembers
    model = read_model(small_tokenizer.path)
    model.normalizer_spec.remove_extra_whitespaces = True
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    encoder = BulkEncoder(load_tokenizer(tmp_path))
    assert not encoder.remembers
    assert encoder.encode(" a  b").tolist() == encoder.tokenizer.encode(" a  b")


def test_memory_stays_bounded(small_tokenizer, monkeypatch):
    encoder = BulkEncoder(small_tokenizer)
    monkeypatch.setattr(bulk, "MEMORY_BYTES", 10_000)
    most = 0
    for i in range(300):
        text = f"unseen{'x' * i} " * 3
        assert encoder.encode(text).tolist() == small_tokenizer.encode(text)
        most = max(most, len(encoder._memory._rows))
    assert 5 < most < 60


def _with_piece(tokenizer, folder, piece, type, score=-1e6):
    model = read_model(tokenizer.path)
    model.pieces.add(piece=piece, score=score, type=type)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return load_tokenizer(folder)
