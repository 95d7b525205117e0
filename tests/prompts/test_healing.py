"""Where a prompt that stops inside a word is cut back, in Llama's vocabulary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.prompts import heal, infill_prompt


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("import numpy as np\nimp", b"imp"),
        ("imp", b" imp"),  # the space that encode puts in front
        ("def f(x):\n    retur", b" retur"),  # two tokens, ret|ur, that one may spell
        ("def f(x):\n    ", b"    "),
        ("    return ", b" "),
        ("x = np.", b"."),
        ("print('hello worl", b" worl"),
        ("é", " é".encode()),
        ("x\n", b""),  # no token goes beyond a newline
        ("a🦙", b""),
    ],
)
def test_a_prompt_is_cut_to_where_one_token_may_go_beyond_its_end(code_llama_tokenizer, text: str, cut: bytes) -> None:
    prompt = code_llama_tokenizer.encode(text, bos=True)
    kept, begins_with = heal(code_llama_tokenizer, prompt)
    assert begins_with == cut
    assert kept == prompt[: len(kept)]
    assert code_llama_tokenizer.decode_bytes(prompt[len(kept) :], leading_space=False) == cut


def test_control_ids_are_never_cut(code_llama_tokenizer) -> None:
    for order in ("psm", "spm"):
        prompt = infill_prompt(code_llama_tokenizer, "", "x", order=order)
        assert heal(code_llama_tokenizer, prompt) == (prompt, b"")
    spm = infill_prompt(code_llama_tokenizer, "imp", "x", order="spm")
    assert heal(code_llama_tokenizer, spm) == (spm[:-1], b" imp")
    assert heal(code_llama_tokenizer, [1]) == ([1], b"")


@pytest.fixture(scope="module")
def spellings(code_llama_tokenizer) -> dict[int, bytes]:
    """What each id of text spells."""
    ids = set(range(code_llama_tokenizer.vocab_size)) - code_llama_tokenizer.control - {code_llama_tokenizer.unk_id}
    return {i: code_llama_tokenizer.decode_bytes([i], leading_space=False) for i in sorted(ids)}


@settings(max_examples=50)
@given(text=st.binary(min_size=1, max_size=6) | st.sampled_from([b" retur", b"    ", " é".encode(), b"\xe2\x80"]))
def test_ids_along_a_text_are_those_whose_spelling_agrees_with_it(code_llama_tokenizer, spellings, text: bytes) -> None:
    agree = [i for i, spelling in spellings.items() if spelling.startswith(text) or text.startswith(spelling)]
    assert sorted(code_llama_tokenizer.ids_along(text)) == agree
    goes_on = any(len(spellings[i]) > len(text) for i in agree)
    assert code_llama_tokenizer.has_piece_beyond(text) == goes_on
