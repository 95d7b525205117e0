"""tokenizer.json: the same promises as SentencePiece's, and the library's own ids."""

import json
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from puna.errors import PunaError
from puna.tokenizer import load_tokenizer
from puna.tokenizer.base import INFILLING_PIECES, SPACE_MARK
from puna.tokenizer.sentence_piece import NORMAL, read_model

CODE = "def add(first, second):\n    return first + second\n\n\nclass Point:\n    x: int = 12\n"
FRAGMENTS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\0",
    "\u2581",
    "\ue000",
    "<s>",
    "</s>",
    "<|end|>",
    "<|end",
    " <PRE>",
    "<EOT><EOT>",
]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
texts = st.lists(st.sampled_from([*FRAGMENTS, CODE]) | any_text).map("".join)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level vocabulary as GPT-2's family has, with three control tokens and an ordinary added one."""
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials, alphabet = ["<|begin|>", "<|end|>", "<|turn|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([CODE] * 10, trainer)
    backend.add_tokens(["<think>"])
    backend.save(str(path))
    path.with_name("tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}})
    )
    return load_tokenizer(path)


def llama_like_content(tokenizer, *, scheme):
    """What a converter that respects the scores makes of a SentencePiece vocabulary."""
    model = read_model(tokenizer.path)
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    by_score = sorted((p for p in model.pieces if p.type == NORMAL), key=lambda p: -p.score)
    merges = [
        (p.piece[:i], p.piece[i:])
        for p in by_score
        for i in range(1, len(p.piece))
        if p.piece[:i] in ids and p.piece[i:] in ids
    ]
    backend = tokenizers.Tokenizer(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(backend.to_str())


@pytest.fixture(scope="module")
def llama_like(code_llama_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama_like") / "tokenizer.json"
    path.write_text(json.dumps(llama_like_content(code_llama_tokenizer, scheme="prepend")))
    return load_tokenizer(path)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_a_byte_level_vocabulary_loses_nothing_and_lets_no_control_token_in(byte_level, text):
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert not {0, 1, 2}.intersection(ids)
    stream = byte_level.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == text


def test_byte_level_ids_are_the_librarys_own(byte_level):
    peer = tokenizers.Tokenizer.from_file(str(byte_level.path))
    for text in [CODE, " leading", "é 👩", "<think>x"]:
        assert byte_level.encode(text) == peer.encode(text, add_special_tokens=False).ids
    assert peer.encode("<|end|>").ids == [1]
    assert 1 not in byte_level.encode("<|end|>")
    assert byte_level.encode(CODE, leading_space=False) == byte_level.encode(CODE)
    assert byte_level.encode_batch([CODE, " x"], bos=True) == [
        [0, *byte_level.encode(CODE)],
        [0, *byte_level.encode(" x")],
    ]


@pytest.mark.parametrize("marker", ["<|fim_prefix|>", "<\uff5cfim\u2581begin\uff5c>"])
def test_an_added_marker_is_a_control_token_even_where_the_file_does_not_call_it_special(byte_level, tmp_path, marker):
    backend = tokenizers.Tokenizer.from_file(str(byte_level.path))
    backend.add_tokens([marker])
    byte_level.save(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.id_of(marker) in backend.encode(f"x {marker}").ids
    assert tokenizer.id_of(marker) not in tokenizer.encode(f"x {marker}")
    assert tokenizer.decode(tokenizer.encode(f"x {marker}")) == f"x {marker}"
    assert tokenizer.id_of("<think>") in tokenizer.encode("<think>")  # text, which a user may write


def test_special_ids_come_from_the_file_beside_it(byte_level, tmp_path):
    assert (byte_level.bos_id, byte_level.eos_id, byte_level.unk_id) == (0, 1, None)
    byte_level.save(tmp_path)
    assert load_tokenizer(tmp_path).eos_id == 1
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(PunaError, match="does not say which token ends a document"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"bos_token_id": null, "eos_token_id": [2, 1]}')
    again = load_tokenizer(tmp_path)
    assert (again.bos_id, again.eos_id) == (2, 2)


def test_a_llama_like_vocabulary_gives_sentencepieces_ids(llama_like, code_llama_tokenizer):
    for text in [CODE, " a", "  b", "", "x <PRE> y <EOT><EOT>", "<s></s>", "é 👩 \u2581\u2581", "12 345", "<0x41>"]:
        for leading_space in (True, False):
            ids = llama_like.encode(text, leading_space=leading_space)
            assert ids == code_llama_tokenizer.encode(text, leading_space=leading_space), repr(text)
            assert llama_like.decode(ids, leading_space=leading_space) == text
    assert llama_like.infilling == code_llama_tokenizer.infilling
    assert llama_like.id_of("<0x41>") == 68


def test_a_llama_like_file_would_let_markers_in_without_protection(llama_like):
    peer = tokenizers.Tokenizer.from_file(str(llama_like.path))
    assert 32007 in peer.encode("x <PRE>").ids
    assert 2 in peer.encode("</s>").ids


@settings(max_examples=50, deadline=None)
@given(text=texts, leading_space=st.booleans())
def test_a_llama_like_vocabulary_loses_nothing_and_lets_no_control_token_in(llama_like, text, leading_space):
    ids = llama_like.encode(text, leading_space=leading_space)
    assert llama_like.decode(ids, leading_space=leading_space) == text
    assert not {0, 1, 2}.intersection(ids)
    assert max(ids, default=0) < 32000


def test_where_the_leading_space_goes_beside_control_tokens_follows_the_file(small_tokenizer, tmp_path):
    for scheme, after_control in [("prepend", True), ("always", True), ("first", False)]:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(llama_like_content(small_tokenizer, scheme=scheme)))
        tokenizer, peer = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
        assert tokenizer.adds_leading_space
        assert tokenizer.adds_space_after_control is after_control
        expected = [*tokenizer.encode("a"), 2, *tokenizer.encode("b", leading_space=after_control)]
        assert peer.encode("a</s>b", add_special_tokens=False).ids == expected


def test_markers_that_were_added_beyond_a_models_vocabulary_are_dropped(small_tokenizer, tmp_path):
    content = llama_like_content(small_tokenizer, scheme="prepend")
    for piece in INFILLING_PIECES:
        del content["model"]["vocab"][piece]
    markers = [f"{SPACE_MARK}<{name}>" for name in ("PRE", "MID", "SUF", "EOT")]
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [{"id": 1008 + i, "content": m, "special": True, **token} for i, m in enumerate(markers)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 1012
    assert tokenizer.infilling is not None
    tokenizer.check_vocab_size(1008)
    assert (tokenizer.vocab_size, tokenizer.infilling) == (1008, None)
    with pytest.raises(PunaError, match="outside the vocabulary"):
        tokenizer.decode([1008])


def test_kinds_of_vocabularies_that_cannot_keep_the_promises_are_refused(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PunaError, match="neither byte-level nor Llama-like"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "no such"}}')
    with pytest.raises(PunaError, match="is not a tokenizer that the `tokenizers` library can read"):
        load_tokenizer(tmp_path)


def test_control_tokens_take_the_blanks_along_that_the_file_says(byte_level, tmp_path):
    content = json.loads(byte_level.path.read_text())
    content["added_tokens"][2]["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert list(tokenizer.find_controls("a<|turn|> \nb<|end|> ")) == [(1, 11, 2), (12, 19, 1)]


@pytest.fixture(scope="module")
def stripping(byte_level, tmp_path_factory):
    """One control token takes the blanks on its left along, one those on its right, one both."""
    content = json.loads(byte_level.path.read_text())
    for token, sides in zip(content["added_tokens"], (["lstrip"], ["rstrip"], ["lstrip", "rstrip"]), strict=False):
        token.update(dict.fromkeys(sides, True))
    path = tmp_path_factory.mktemp("stripping") / "tokenizer.json"
    path.write_text(json.dumps(content))
    path.with_name("tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return load_tokenizer(path)


@given(text=st.lists(st.sampled_from(["<|begin|>", "<|end|>", "<|turn|>", " ", "\n", "\xa0", "a", "<|"])).map("".join))
def test_control_tokens_are_found_as_one_pattern_with_their_blanks_would(stripping, text):
    pattern = re.compile(r"\s*(<\|begin\|>)|(<\|end\|>)\s*|\s*(<\|turn\|>)\s*")
    expected = [(*match.span(), match.lastindex - 1) for match in pattern.finditer(text)]
    assert list(stripping.find_controls(text)) == expected
