"""Infilling prompts, token for token."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import PunaError, UsageError
from puna.prompts import cut_around_gap, infill_document, infill_prompt, infill_stops
from puna.tokenizer import load_tokenizer

PREFIX = 'def remove_non_ascii(s: str) -> str:\n    """ '
SUFFIX = "\n    return result\n"

#: From Meta's repository, published in ggerganov/llama.cpp#3503.
GOLDEN = (
    "1 32007 822 3349 29918 5464 29918 294 18869 29898 29879 29901 851 29897 1599 851 29901 13 1678 9995 29871 "
    "32008 13 1678 736 1121 13 32009"
)
PRE, SUF, MID, EOT = 32007, 32008, 32009, 32010


def test_the_published_prompt_comes_out(code_llama_tokenizer):
    assert infill_prompt(code_llama_tokenizer, PREFIX, SUFFIX) == [int(id) for id in GOLDEN.split()]


def test_suffix_first_swaps_the_parts_but_not_their_ids(code_llama_tokenizer):
    golden = [int(id) for id in GOLDEN.split()]
    suf, mid = golden.index(SUF), golden.index(MID)
    expected = [1, PRE, SUF, *golden[suf + 1 : mid], MID, *golden[2:suf]]
    assert infill_prompt(code_llama_tokenizer, PREFIX, SUFFIX, order="spm") == expected


def test_empty_parts_leave_the_markers(code_llama_tokenizer):
    assert infill_prompt(code_llama_tokenizer, "def f(", "") == [1, PRE, 822, 285, 29898, SUF, MID]
    assert infill_prompt(code_llama_tokenizer, "", "b") == [1, PRE, SUF, 29890, MID]
    assert infill_prompt(code_llama_tokenizer, "", "", order="spm") == [1, PRE, SUF, MID]


def test_a_training_document_is_the_prompt_with_its_answer(code_llama_tokenizer):
    # "lf" and " = 1": 29880 29888 and 353 29871 29896; psm splits the word where the cut is
    encode = code_llama_tokenizer.encode
    psm = infill_document(code_llama_tokenizer, "se", "lf = 1", "\n", order="psm")
    assert psm == [1, PRE, *encode("se"), SUF, 13, MID, *encode("lf = 1", leading_space=False), EOT]
    assert psm[: psm.index(MID) + 1] == infill_prompt(code_llama_tokenizer, "se", "\n")
    spm = infill_document(code_llama_tokenizer, "se", "lf = 1", "\n", order="spm")
    assert spm == [1, PRE, SUF, 13, MID, 1583, 353, 29871, 29896, EOT]  # 1583: ▁self


def test_every_character_of_a_document_is_in_it_once(small_tokenizer):
    markers = small_tokenizer.infilling
    for order in ("psm", "spm"):
        ids = infill_document(small_tokenizer, "def f(x):\n", "    return x", "\n\nprint(<EOT>)", order=order)
        pre, suf, mid, eot = (
            ids.index(id) for id in (markers.prefix_id, markers.suffix_id, markers.middle_id, markers.eot_id)
        )
        suffix = small_tokenizer.decode(ids[suf + 1 : mid], leading_space=False)
        before, gap = ids[pre + 1 : suf], ids[mid + 1 : eot]
        assert suffix == "\n\nprint(<EOT>)"
        assert small_tokenizer.decode([*before, *gap]) == "def f(x):\n    return x"
        assert ids.count(markers.eot_id) == 1
        assert eot == len(ids) - 1


def test_markers_in_the_users_code_stay_text(code_llama_tokenizer):
    ids = infill_prompt(code_llama_tokenizer, "a <SUF> b <MID>", " <EOT>")
    assert [id for id in ids if id >= 32000] == [PRE, SUF, MID]


def test_infilling_ends_at_eot_or_eos(code_llama_tokenizer):
    assert infill_stops(code_llama_tokenizer) == (EOT, 2)


def test_a_vocabulary_without_markers_cannot_infill(shared):
    python = load_tokenizer(shared / "data/tokenizer/tokenizer.model")
    for ask in (
        lambda: infill_prompt(python, "a", "b"),
        lambda: infill_document(python, "a", "b", "c", order="psm"),
        lambda: infill_stops(python),
    ):
        with pytest.raises(PunaError, match=r"has no infilling markers; .* 34B and Python cannot"):
            ask()


def test_an_unknown_order_is_refused(small_tokenizer):
    with pytest.raises(UsageError, match='"psm" or "spm", not \'pms\''):
        infill_prompt(small_tokenizer, "a", "b", order="pms")


# Long files

LINES = st.lists(st.sampled_from(["", "x", "def f(x):", "    return naïve + 🦙", "a b c d e f g h"]), max_size=30)
TEXTS = LINES.map("\n".join)


def tokens_of(tokenizer, prefix: str, suffix: str) -> int:
    return len(infill_prompt(tokenizer, prefix, suffix))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prefix=TEXTS, suffix=TEXTS, budget=st.integers(4, 150))
def test_what_is_cut_fits_the_budget_in_whole_lines_around_the_gap(small_tokenizer, prefix, suffix, budget):
    before, behind = cut_around_gap(small_tokenizer, prefix, suffix, budget)
    assert prefix.endswith(before)
    assert suffix.startswith(behind)
    assert tokens_of(small_tokenizer, before, behind) <= budget
    if tokens_of(small_tokenizer, prefix, suffix) <= budget:
        assert (before, behind) == (prefix, suffix)
    line_before, line_behind = prefix.rpartition("\n")[2], "".join(suffix.partition("\n")[:2])
    if tokens_of(small_tokenizer, line_before, line_behind) <= budget:
        rest_before, rest_behind = prefix[: len(prefix) - len(before)], suffix[len(behind) :]
        assert before.endswith(line_before)
        assert behind.startswith(line_behind)
        assert rest_before == "" or rest_before.endswith("\n")
        assert rest_behind == "" or behind.endswith("\n")
        one_more_before = "\n".join(prefix.split("\n")[-2 - before.count("\n") :])
        one_more_behind = "".join(suffix.splitlines(keepends=True)[: 1 + behind.count("\n")])
        if rest_before:
            assert tokens_of(small_tokenizer, one_more_before, behind) > budget, "a line more would not fit"
        if rest_behind:
            assert tokens_of(small_tokenizer, before, one_more_behind) > budget
    else:
        assert line_before.endswith(before)
        assert line_behind.startswith(behind)


def test_the_prefix_gets_three_quarters_where_both_are_too_long(small_tokenizer):
    text = "a = 1\n" * 500
    line = len(small_tokenizer.encode(text, leading_space=False)) // 500
    before, behind = cut_around_gap(small_tokenizer, text, text, 4 + 100 * line)
    assert 73 <= before.count("\n") <= 75
    assert before.count("\n") + behind.count("\n") in (99, 100)


def test_what_one_side_does_not_need_is_the_others(small_tokenizer):
    text = "a = 1\n" * 500
    short_behind = cut_around_gap(small_tokenizer, text, "b\n", 500)
    short_before = cut_around_gap(small_tokenizer, "b\n", text, 500)
    assert (short_behind[1], short_before[0]) == ("b\n", "b\n")
    for texts in (short_behind, short_before):
        assert 490 < tokens_of(small_tokenizer, *texts) <= 500


def test_a_line_that_alone_is_too_long_is_cut_at_its_far_ends(small_tokenizer):
    line = ", ".join(str(number) for number in range(1000))
    before, behind = cut_around_gap(small_tokenizer, "first\n" + line, line + "\nlast", 200)
    assert line.endswith(before)
    assert line.startswith(behind)
    assert 195 <= tokens_of(small_tokenizer, before, behind) <= 200
    assert 2.5 < len(small_tokenizer.encode(before)) / len(small_tokenizer.encode(behind, leading_space=False)) < 3.5


def test_a_budget_below_the_markers_is_refused(small_tokenizer):
    assert cut_around_gap(small_tokenizer, "a\n", "b", 4) == ("", "")
    with pytest.raises(UsageError, match="budget of 3 tokens does not hold an infilling prompt's 4 markers; raise it"):
        cut_around_gap(small_tokenizer, "a", "b", 3)
