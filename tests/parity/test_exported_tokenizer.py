"""The tokenizer of a folder that puna wrote, opened by transformers: the ids that SentencePiece gives."""

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.checkpoint import save_model
from puna.testing import tiny_model, write_tiny_model
from puna.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

#: Text as code has it: runs of spaces, tabs and newlines, digits, letters, characters beyond the vocabulary.
CODE = st.lists(
    st.sampled_from([" ", "    ", "\t", "\n", "def", "return", "x", "1", "(", "é", "中", "😀", "\x00"])
).map("".join)

Pair = tuple[Tokenizer, transformers.PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A vocabulary with infilling markers."""
    folder = write_tiny_model(tmp_path_factory.mktemp("small") / "model")
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Llama's 32,000 pieces."""
    tokenizer = load_tokenizer(shared / "data" / "tokenizer" / "tokenizer.model")
    folder = tmp_path_factory.mktemp("llama") / "model"
    save_model(tiny_model(vocab_size=tokenizer.vocab_size), folder, tokenizer=tokenizer)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=300)
@given(text=CODE)
def test_code_gets_the_ids_of_sentencepiece(small, text):
    assert_same(*small, text)


@pytest.mark.parametrize(
    "text", [" " * n + "return" for n in range(40)] + ["\n\n\tif x:\n\t\tpass\n", "déjà vu 中文 😀"]
)
def test_llamas_vocabulary_gives_indented_code_its_ids(llama, text):
    assert_same(*llama, text)


def test_llamas_vocabulary_gives_whole_files_their_ids(llama):
    for file in sorted(Path(__file__).parents[2].glob("puna/model/*.py")):
        assert_same(*llama, file.read_text(encoding="utf-8"))


def test_the_markers_of_infilling_are_known_by_name(small):
    ours, theirs = small
    names = [f"▁<{name}>" for name in ("PRE", "SUF", "MID", "EOT")]
    marks = ours.infilling
    assert theirs.convert_tokens_to_ids(names) == [marks.prefix_id, marks.suffix_id, marks.middle_id, marks.eot_id]
    assert_same(ours, theirs, "x = 1 <EOT> <PRE>")


def test_pieces_that_were_added_after_the_models_own_have_their_ids(tmp_path):
    train_tokenizer([Path(__file__).read_text()], tmp_path / "own", vocab_size=400)
    (tmp_path / "own/added_tokens.json").write_text(json.dumps({"[PAD]": 400, "<|im_end|>": 403}))
    ours = load_tokenizer(tmp_path / "own")
    save_model(tiny_model(vocab_size=404), tmp_path / "model", tokenizer=ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.convert_tokens_to_ids(["[PAD]", "<|im_end|>"]) == [400, 403]
    assert theirs.encode("[PAD]<|im_end|>", add_special_tokens=False) == [400, 403]
    assert_same(ours, theirs, "return x  # in [brackets]")


def test_markers_of_a_vocabulary_that_the_model_has_no_embedding_for_are_left_out(code_llama_tokenizer, tmp_path):
    ours = load_tokenizer(code_llama_tokenizer.path)
    save_model(tiny_model(vocab_size=32_000), tmp_path / "model", tokenizer=ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert_same(ours, theirs, "x <PRE> y <EOT>")


def assert_same(ours: Tokenizer, theirs: transformers.PreTrainedTokenizerBase, text: str) -> None:
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    ids = theirs.encode(text)
    assert ids == ours.encode(text, bos=True)
    assert theirs.decode(ids, skip_special_tokens=True) == text
