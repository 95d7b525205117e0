"""Quick cleaning of Wikitext gives what the rules give one by one."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from puna.data.cleaning import clean_quickly
from puna.data.corpora.wikitext import clean

FRAGMENTS = [
    *" @-,.:;!?()[]{}\"'=sNx\n\t", "\u00b0", "\u00a0", "\u2003", "\u0160", "\0", "\x1c", "  ", " @-@ ", "@,@ ", " @.@",
    " , ", " . . ", "s '", " 's ", " N ", "= = = =", " \n ", " \u00b0 ", "naïve", "木",
]  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=24).map("".join))
@example(text=" @-@ @-@ @,@ ")
@example(text=" . . . . ; : , ; , x")
@example(text='( (a ) b )) " \u2003x " \' y')
@example(text="\n  \n \n")
@example(text="@")
def test_a_text_is_cleaned_as_by_the_rules_one_by_one(text: str) -> None:
    assert clean_quickly(text) == clean(text)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_real_wikitext_is_cleaned_as_by_the_rules_one_by_one(shared, part: str) -> None:
    text = (shared / f"data/wikitext-2/wiki.{part}.tokens").read_text(encoding="utf-8")
    assert clean_quickly(text) == clean(text)
