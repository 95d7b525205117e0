"""Drafts: what is filled in later is what the tokenizer gives at once."""

import numpy as np
import pytest

from puna.data.drafts import DraftTokenizer
from puna.prompts import Encoded, chat_template, infill_document

DIALOGS = [
    [{"role": "user", "content": "Add 2 and 3."}, {"role": "assistant", "content": "5\n"}],
    [{"role": "user", "content": "naïve ▁?"}, {"role": "assistant", "content": "» x"}],
]


@pytest.fixture
def drafts(code_llama_tokenizer) -> DraftTokenizer:
    return DraftTokenizer(code_llama_tokenizer)


@pytest.mark.parametrize("name", ["codellama", "vicuna", "alpaca", "plain"])
def test_a_filled_dialog_is_what_the_template_lays_out(drafts, code_llama_tokenizer, name):
    template = chat_template(name)
    drafted = [template.encode(drafts, dialog) for dialog in DIALOGS]
    for (tokens, is_target), dialog in zip(drafts.fill(drafted), DIALOGS, strict=True):
        expected = template.encode(code_llama_tokenizer, dialog)
        assert tokens.dtype == np.int32
        assert (tokens.tolist(), is_target.tolist()) == (expected.tokens, expected.is_target)


def test_filled_documents_are_what_is_encoded_at_once(drafts, code_llama_tokenizer):
    parts = ("def f", "(x):\n", "    return x\n")
    for order in ("psm", "spm"):
        texts = [Encoded(drafts.encode(text, bos=True, eos=True)) for text in ("", *parts)]
        cut = Encoded(infill_document(drafts, *parts, order=order))
        *whole, (infilled, is_target) = drafts.fill([*texts, cut])
        assert is_target is None
        assert infilled.tolist() == infill_document(code_llama_tokenizer, *parts, order=order)
        assert [tokens.tolist() for tokens, _ in whole] == [
            code_llama_tokenizer.encode(text, bos=True, eos=True) for text in ("", *parts)
        ]


def test_what_was_drafted_and_given_up_disturbs_nothing(drafts, code_llama_tokenizer):
    drafts.encode("given up")
    kept = Encoded(drafts.encode("kept"))
    assert [tokens.tolist() for tokens, _ in drafts.fill([kept])] == [code_llama_tokenizer.encode("kept")]
    assert list(drafts.fill([])) == []
