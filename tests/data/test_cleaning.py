"""Quick cleaning of Wikitext gives what the rules give one by one."""

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from puna.data.cleaning import clean_quickly
from puna.data.corpora.wikitext import _without_padding, clean, clean_piece

FRAGMENTS = [
    *" @-,.:;!?()[]{}\"'=sNx\n\t", "\u00b0", "\u00a0", "\u2003", "\u0160", "\0", "\x1c", "  ", " @-@ ", "@,@ ", " @.@",
    " , ", " . . ", "s '", " 's ", " N ", "= = = =", " \n ", " \u00b0 ", "naïve", "木",
]  # fmt: skip


PIECES = st.lists(st.sampled_from(FRAGMENTS), max_size=24).map("".join)


@settings(max_examples=1500, deadline=None)
@given(text=PIECES.map(lambda text: re.sub(" +", " ", text)))
@example(text=" . . . . ; : , ; , x")
@example(text='( (a ) b )) " x " \' y')
@example(text="\n \n \n")
@example(text="@")
def test_a_text_is_cleaned_as_by_the_rules_one_by_one(text: str) -> None:
    assert clean_quickly(text.encode()) in (clean(text).encode(), None)


@settings(max_examples=500, deadline=None)
@given(text=PIECES, opened=st.sampled_from(["", "(", '["']))
@example(text=" @-@ @-@ @,@ ", opened="")
@example(text='" \u2003x "', opened="")
@example(text="\n  \n \n", opened="")
def test_a_piece_of_any_text_is_cleaned_as_by_the_rules(text: str, opened: str) -> None:
    whole = clean(f"{opened}x\n{text}x")
    assert clean_piece(text.encode(), opened, "") == whole.removeprefix(f"{opened}x\n").removesuffix("x").encode()


#: What the published rules say of marks that come in pairs.
PADDED = {
    "()": re.compile(r"\(\s*([^\)]*?)\s*\)"),
    "[]": re.compile(r"\[\s*([^\]]*?)\s*\]"),
    "{}": re.compile(r"{\s*([^}]*?)\s*}"),
    '""': re.compile(r"\"\s*([^\"]*?)\s*\""),
    "''": re.compile(r"'\s*([^']*?)\s*'"),
}


@settings(max_examples=500)
@given(text=PIECES, pair=st.sampled_from(sorted(PADDED)))
def test_pairs_lose_their_padding_as_by_the_published_rules(text: str, pair: str) -> None:
    opening, closing = pair
    assert _without_padding(text, opening, closing) == PADDED[pair].sub(rf"{opening}\1{closing}", text)


@pytest.mark.parametrize("text", ["(" * 100_000, "(" + " " * 100_000 + "x" + " " * 100_000 + ")", '[ " ' * 50_000])
def test_a_text_of_open_brackets_or_blanks_takes_no_longer_than_another(text: str) -> None:
    started = time.process_time()
    assert clean_piece(f"a  {text}".encode(), "", "")
    assert time.process_time() - started < 2


@pytest.mark.parametrize("part", ["valid", "test"])
def test_real_wikitext_is_cleaned_quickly_and_as_by_the_rules(shared, part: str) -> None:
    text = (shared / f"data/wikitext-2/wiki.{part}.tokens").read_text(encoding="utf-8")
    assert clean_quickly(text.encode()) == clean(text).encode()
