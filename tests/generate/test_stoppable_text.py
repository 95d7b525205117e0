"""Text that grows: the pieces given out never have to be taken back."""

from hypothesis import given, settings
from hypothesis import strategies as st

from puna.generate.text import StoppableText

LETTERS = st.text("abc\n", max_size=12)


def cut(text: str, stop: list[str]) -> str:
    """The plain formula: the shortest beginning of `text` that ends in a stop string, without that string."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=400, deadline=None)
@given(pieces=st.lists(LETTERS, max_size=8), stop=st.lists(st.text("abc\n", min_size=1, max_size=5), max_size=3))
def test_pieces_add_up_to_the_text_before_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    growing = StoppableText(stop)
    given_out = []
    for piece in pieces:
        given_out.append(growing.push(piece))
        assert growing.text == "".join(given_out)
        assert cut("".join(pieces), stop).startswith(growing.text)
    given_out.append(growing.finish())
    text = "".join(pieces)
    assert "".join(given_out) == growing.text == cut(text, stop)
    assert growing.is_stopped == any(s in text for s in stop)


@settings(max_examples=100, deadline=None)
@given(text=LETTERS, stop=st.lists(st.text("abc\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_more_is_held_back_than_could_still_become_a_stop_string(text: str, stop: list[str]) -> None:
    growing = StoppableText(stop)
    growing.push(text)
    if not growing.is_stopped:
        held = text.removeprefix(growing.text)
        assert held == "" or any(s.startswith(held) and s != held for s in stop)


def test_a_stop_string_across_pieces_is_never_seen() -> None:
    growing = StoppableText(["\n\ndef"])
    assert [growing.push(piece) for piece in ("a", "b\n", "\nd", "ef g")] == ["a", "b", "", ""]
    assert growing.is_stopped
    assert growing.push("more") == growing.finish() == ""
    assert growing.text == "ab"


def test_what_only_looked_like_a_stop_string_comes_after_all() -> None:
    growing = StoppableText(["\n\ndef"])
    assert growing.push("a\n\nde") == "a"
    assert growing.push("l x\n") == "\n\ndel x"
    assert growing.finish() == "\n"


def test_without_stop_strings_nothing_is_held_back() -> None:
    growing = StoppableText()
    assert [growing.push("a\n"), growing.push("b"), growing.finish()] == ["a\n", "b", ""]
