"""The promises of every tokenizer, on a small trained vocabulary and on Llama's."""

import hashlib
import json
import os
import pickle
import re
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import PunaError
from puna.tokenizer import Infilling, Tokenizer, load_tokenizer, train_tokenizer
from puna.tokenizer.base import INFILLING_PIECES
from puna.tokenizer.sentence_piece import CONTROL, NORMAL, USER_DEFINED, read_model

#: What breaks tokenizers: blanks, controls, markers, marks of space, stand-ins, joined and combining characters.
FRAGMENTS = [
    " ", "  ", "    ", "\n", "\r\n", "\t", "\0", "\u2581", "\ue000", "\ue001", "☺", "▁<PRE>", " <PRE>", " <SUF>x",
    " <MID>", " <EOT>", "<EOT><EOT>", "<SU", " <E", "<s>", "</s>", "<unk>", "<0x41>", "<step>", "é", "e\u0301",
    "👩\u200d👩\u200d👧", "def f(x):", "return", "0x1F", "12", "\ufeff", "\ufffd", "\x7f", "\u2028",
]  # fmt: skip
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
texts = st.lists(st.sampled_from(FRAGMENTS) | any_text).map("".join)


@settings(max_examples=100, deadline=None)
@given(text=texts, leading_space=st.booleans())
def test_decoding_what_was_encoded_gives_the_same_text(small_tokenizer, text, leading_space):
    ids = small_tokenizer.encode(text, leading_space=leading_space)
    assert small_tokenizer.decode(ids, leading_space=leading_space) == text
    assert small_tokenizer.decode_bytes(ids, leading_space=leading_space) == text.encode()


@settings(max_examples=100, deadline=None)
@given(text=texts, leading_space=st.booleans())
def test_no_text_becomes_a_control_token(small_tokenizer, text, leading_space):
    control = {0, 1, 2, *range(1024 - 16, 1024)}
    assert not control.intersection(small_tokenizer.encode(text, leading_space=leading_space))


def test_every_fragment_survives_alone_in_llamas_vocabulary(code_llama_tokenizer):
    for text in [*FRAGMENTS, "".join(FRAGMENTS), "a" + "\u2581" * 5 + "b", ""]:
        ids = code_llama_tokenizer.encode(text)
        assert code_llama_tokenizer.decode(ids) == text
        assert not {0, 1, 2}.intersection(ids)
        assert max(ids, default=0) < 32000


def test_ids_equal_sentencepieces_own_where_nothing_needs_protection(small_tokenizer):
    peer = sentencepiece.SentencePieceProcessor(model_file=str(small_tokenizer.path))
    for text in ["def f(x):\n    return x", " a", "  b", "a\r\n\tb", "é 👩 日本", "</s> <s> <unk>", "12 345"]:
        assert small_tokenizer.encode(text) == peer.encode(text)
        assert small_tokenizer.encode(text, leading_space=False) == peer.encode("☺" + text)[len(peer.encode("☺")) :]


def test_the_vectors_of_llama_cpp_come_out(shared):
    tokenizer = load_tokenizer(shared / "data/tokenizer")
    name = "data/tokenizer/ggml-vocab-llama-spm.gguf"
    inputs = (shared / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = (shared / f"{name}.out").read_text().split("\n")
    assert len(inputs) == len(outputs) == 47
    for text, ids in zip(inputs, outputs, strict=True):
        assert tokenizer.encode(text) == [int(i) for i in ids.split()], repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_infilling_markers_that_the_file_types_as_ordinary_cannot_be_written_by_a_user(code_llama_tokenizer):
    unprotected = sentencepiece.SentencePieceProcessor(model_file=str(code_llama_tokenizer.path))
    text = "x <PRE> y <SUF> z <MID> w <EOT>"
    assert {32007, 32008, 32009, 32010} <= set(unprotected.encode(text))
    assert max(code_llama_tokenizer.encode(text)) < 32000
    assert code_llama_tokenizer.infilling == Infilling(prefix_id=32007, suffix_id=32008, middle_id=32009, eot_id=32010)
    assert code_llama_tokenizer.decode([32007, *code_llama_tokenizer.encode("a b"), 32010]) == "a b"


def test_text_inside_a_line_takes_no_implicit_space(code_llama_tokenizer):
    peer = sentencepiece.SentencePieceProcessor(model_file=str(code_llama_tokenizer.path))
    for text in ["b", " b", "\n    return result\n", "", "  x", ")\n"]:
        assert code_llama_tokenizer.encode(text, leading_space=False) == peer.encode("☺" + text)[2:]
    assert code_llama_tokenizer.encode("b", leading_space=False) == [29890]
    assert code_llama_tokenizer.encode("b") == [289]
    assert code_llama_tokenizer.decode([289], leading_space=False) == " b"


def test_begin_and_end_are_put_around_a_text_only_where_asked(small_tokenizer):
    plain = small_tokenizer.encode("a b")
    assert small_tokenizer.encode("a b", bos=True, eos=True) == [1, *plain, 2]
    assert small_tokenizer.encode_batch(["a b", ""], bos=True) == [[1, *plain], [1]]
    assert small_tokenizer.encode_batch(["a b", "\u2581"], eos=True)[0] == [*plain, 2]
    assert (small_tokenizer.bos_id, small_tokenizer.eos_id, small_tokenizer.unk_id) == (1, 2, 0)


@settings(max_examples=100, deadline=None)
@given(text=texts, cut=st.integers(0, 5))
def test_a_stream_gives_whole_characters_that_add_up_to_the_decoded_text(small_tokenizer, text, cut):
    ids = small_tokenizer.encode(text)[cut:]
    stream = small_tokenizer.stream()
    parts = [stream.push(id) for id in ids]
    assert "".join([*parts, stream.finish()]) == small_tokenizer.decode(ids, leading_space=False)


def test_a_stream_waits_for_the_rest_of_a_character(small_tokenizer):
    ids = small_tokenizer.encode("🚀", leading_space=False)
    assert len(ids) == 4
    stream = small_tokenizer.stream()
    assert [stream.push(id) for id in ids] == ["", "", "", "🚀"]
    half = small_tokenizer.stream()
    assert [half.push(id) for id in ids[:2]] == ["", ""]
    assert half.finish() == "\ufffd"


def test_ids_outside_the_vocabulary_are_refused(small_tokenizer):
    for id in (1024, -1, 10**9):
        with pytest.raises(PunaError, match=rf"token id {id} is outside the vocabulary of .* \(0 to 1023\)"):
            small_tokenizer.decode([5, id])
        with pytest.raises(PunaError, match="outside the vocabulary"):
            small_tokenizer.stream().push(id)
        with pytest.raises(PunaError, match="outside the vocabulary"):
            small_tokenizer.piece(id)


def test_half_a_surrogate_pair_is_refused_by_name(small_tokenizer):
    for text in ["ab\ud800", "\u2581\ud800"]:
        with pytest.raises(PunaError, match=r"U\+D800 at character \d, half of a surrogate pair"):
            small_tokenizer.encode(text)


def test_pieces_and_ids_name_each_other(small_tokenizer):
    assert small_tokenizer.piece(2) == "</s>"
    assert small_tokenizer.id_of("</s>") == 2
    assert small_tokenizer.id_of("no such piece") is None
    assert [small_tokenizer.piece(i) for i in range(1008, 1024)] == list(INFILLING_PIECES)


def test_a_saved_tokenizer_is_the_same_file_and_brings_its_companions(small_tokenizer, tmp_path):
    (tmp_path / "from").mkdir()
    shutil.copy(small_tokenizer.path, tmp_path / "from")
    (tmp_path / "from/tokenizer_config.json").write_text('{"legacy": true}')
    (tmp_path / "from/config.json").write_text("{}")
    load_tokenizer(tmp_path / "from").save(tmp_path / "to")
    assert sorted(os.listdir(tmp_path / "to")) == ["tokenizer.model", "tokenizer_config.json"]
    again = load_tokenizer(tmp_path / "to")
    assert again.sha256 == small_tokenizer.sha256 == hashlib.sha256(small_tokenizer.path.read_bytes()).hexdigest()


def test_a_tokenizer_can_be_sent_to_another_process(small_tokenizer):
    again: Tokenizer = pickle.loads(pickle.dumps(small_tokenizer))
    assert again.encode("def f(x):") == small_tokenizer.encode("def f(x):")
    assert again.infilling == small_tokenizer.infilling


def _with_more_pieces(tokenizer, folder, pieces, type):
    model = read_model(tokenizer.path)
    for piece in pieces:
        model.pieces.add(piece=piece, score=-1e6, type=type)
    path = folder / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return load_tokenizer(path)


def test_unused_control_pieces_beyond_a_models_vocabulary_are_dropped(small_tokenizer, tmp_path):
    tokenizer = _with_more_pieces(small_tokenizer, tmp_path, ["<step>"], NORMAL)
    assert (tokenizer.vocab_size, tokenizer.step_id) == (1025, 1024)
    tokenizer.check_vocab_size(2000)
    assert tokenizer.step_id == 1024
    tokenizer.check_vocab_size(1008)
    assert (tokenizer.vocab_size, tokenizer.step_id, tokenizer.infilling) == (1008, None, None)
    assert tokenizer.id_of("▁<PRE>") is None
    with pytest.raises(PunaError, match="outside the vocabulary"):
        tokenizer.decode([1008])
    assert tokenizer.decode(tokenizer.encode(" <PRE>")) == " <PRE>"


def test_ordinary_pieces_beyond_a_models_vocabulary_are_refused(small_tokenizer, tmp_path):
    tokenizer = _with_more_pieces(small_tokenizer, tmp_path, ["newword"], NORMAL)
    with pytest.raises(PunaError, match=r"ids up to 1024 \('newword'\) but the model's vocab_size is 1024"):
        tokenizer.check_vocab_size(1024)
    assert tokenizer.vocab_size == 1025


def test_tokens_that_hugging_face_added_beside_a_tokenizer_model_are_control_tokens(small_tokenizer, tmp_path):
    shutil.copy(small_tokenizer.path, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 1025, "<|im_end|>": 1024}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|im_start|>")) == (1026, 1024, 1025)
    assert max(tokenizer.encode("<|im_end|>")) < 1008
    assert tokenizer.decode([1024, *tokenizer.encode("<|im_end|>")]) == "<|im_end|>"
    assert list(tokenizer.find_controls("a<|im_end|>b</s>")) == [(1, 11, 1024), (12, 16, 2)]


@pytest.mark.parametrize("type", [NORMAL, USER_DEFINED])
def test_pieces_that_are_told_special_are_control_tokens_whatever_the_model_says(small_tokenizer, tmp_path, type):
    said = {"added_tokens_decoder": {"0": {"content": "<unk>", "special": True}}}
    said["added_tokens_decoder"]["1024"] = {"content": "<|im_end|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = _with_more_pieces(small_tokenizer, tmp_path, ["<|im_end|>"], type)
    assert (tokenizer.vocab_size, tokenizer.id_of("<|im_end|>")) == (1025, 1024)
    assert 1024 in tokenizer.control
    assert 0 not in tokenizer.control
    assert 1024 not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>")) == "a<|im_end|>"
    assert tokenizer.decode([1024]) == ""


def test_files_that_are_no_tokenizers_are_named(tmp_path):
    with pytest.raises(PunaError, match=re.escape(f"{tmp_path} holds neither tokenizer.model nor tokenizer.json")):
        load_tokenizer(tmp_path)
    with pytest.raises(PunaError, match="nothing does not exist"):
        load_tokenizer(tmp_path / "nothing")
    for name, content in [("tokenizer.model", b"\x00rubbish"), ("tokenizer.model", b""), ("tokenizer.json", b"{}")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PunaError, match=f"{name} is not a"):
            load_tokenizer(tmp_path / name)


def test_a_cut_off_model_is_refused(small_tokenizer, tmp_path):
    content = small_tokenizer.path.read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(PunaError, match="is not a SentencePiece model, or is cut off"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_of_tiktoken_says_what_to_take_instead(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")  # as in Meta's folder of Llama 3
    with pytest.raises(PunaError, match=r"of tiktoken, .* take the Hugging Face version's tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_trained_vocabulary_has_llamas_layout_and_settings(small_tokenizer):
    model = read_model(small_tokenizer.path)
    assert [piece.piece for piece in model.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert [piece.piece for piece in model.pieces[258:259]] == ["<0xFF>"]
    assert {piece.type for piece in model.pieces[-16:]} == {CONTROL}
    assert len(model.pieces) == model.trainer_spec.vocab_size == 1024
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    assert normalizer.name == "identity"
    assert normalizer.add_dummy_prefix
    assert not normalizer.remove_extra_whitespaces
    assert trainer.split_digits
    assert trainer.byte_fallback
    assert [small_tokenizer.piece(i) for i in small_tokenizer.encode("123")] == ["▁", "1", "2", "3"]
    assert small_tokenizer.piece(small_tokenizer.encode("        x")[0]).strip("▁") == ""


def test_the_same_texts_train_the_same_file_in_silence(tmp_path, capfd):
    texts = [f"def name_{i}(x):\n    return x + {i}\n" for i in range(200)]
    first = train_tokenizer(texts, tmp_path / "a", vocab_size=320)
    second = train_tokenizer(iter(texts), tmp_path / "b", vocab_size=320, infilling=True)
    assert first.sha256 == second.sha256
    without = train_tokenizer(texts, tmp_path / "c", vocab_size=304, infilling=False)
    assert without.infilling is None
    assert without.vocab_size == 304
    assert capfd.readouterr() == ("", "")


def test_training_on_too_little_text_says_so(tmp_path):
    for texts in ([], [""], ["ab"]):
        with pytest.raises(PunaError, match=r"cannot train a vocabulary of 5000 on these texts: .*; give more text"):
            train_tokenizer(texts, tmp_path, vocab_size=5000)
    assert not (tmp_path / "tokenizer.model").exists()
