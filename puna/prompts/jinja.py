r"""The chat template that a model ships: Jinja that writes a whole dialog, control tokens and all, as one string.

To keep user text apart from control tokens in that string, the template never sees a control token inside a message: a
character of private use that no message holds stands in for it. After rendering, the string is split at the control
tokens, which can now only be the template's own, and the stand-ins are put back:

    message       "say <|im_end|> to me"                        the user's letters
    rendered      "<|im_start|>user\nsay X to me<|im_end|>\n"    X: the stand-in
    tokens        [im_start] "user\nsay <|im_end|> to me" [im_end] "\n"

Targets are found likewise, by two more such characters around the assistant's words. The prompt for an answer
(`add_generation_prompt`) is encoded apart from the answer, so training and use see the same tokens.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import accumulate, islice, pairwise
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import xxhash

from puna.errors import PunaError
from puna.prompts.dialog import ChatTemplate, Encoded, Message, UnusableDialog, read_messages
from puna.tokenizer import Tokenizer


class JinjaTemplate(ChatTemplate):
    """A model's own template.

    Args:
        source: the Jinja source.
        name: where it is from, for messages.
        specials: `bos_token`, `eos_token` and others that the template writes by name.
    """

    def __init__(self, source: str, *, name: str, specials: dict[str, str]) -> None:
        self.name, self.specials, self.jinja = name, specials, source
        self.digest = xxhash.xxh3_128_hexdigest(json.dumps([source, specials], sort_keys=True).encode())
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise PunaError(f"the chat template of {name} cannot be read: {error}") from None

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        """Lays out a dialog; see `ChatTemplate`. An answer that the template rewrites cannot be marked as a target."""
        read_messages(messages)
        stand_ins = _StandIns(tokenizer, messages)
        messages = [Message(role=m["role"], content=stand_ins.put(m["content"])) for m in messages]
        asks = messages[-1]["role"] == "user"
        text = self._render(messages, asks)
        answers = self._answers(messages, text, stand_ins)
        if answers is None and not asks:
            raise UnusableDialog("the model's template rewrites an answer")
        return _encode(tokenizer, text, answers or [], stand_ins.take)

    def stops(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """EOS, and what the template puts after an answer if that is a control token."""
        probe = [Message(role="user", content="question"), Message(role="assistant", content="answer")]
        end = self.encode(tokenizer, probe).last_target
        return tuple(dict.fromkeys((tokenizer.eos_id, *({end} & tokenizer.control))))

    def _render(self, messages: Sequence[Message], asks: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=asks, tools=None, documents=None, **self.specials
            )
        except Exception as error:  # a template is a program from outside, which may fail in any way
            raise UnusableDialog("the model's template refuses it", str(error)) from None

    def _answers(self, messages: Sequence[Message], text: str, stand_ins: "_StandIns") -> list[tuple[int, int]] | None:
        """Start and stop in `text` of each answer that can be found; None if one cannot."""
        start, stop = stand_ins.start, stand_ins.stop
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        marked = list(messages)
        for i in answers:
            marked[i] = Message(role="assistant", content=_around_words(messages[i]["content"], start, stop))
        pieces = self._render(marked, messages[-1]["role"] == "user").replace(stop, start).split(start)
        if "".join(pieces) != text or len(pieces) != 2 * len(answers) + 1:
            return None
        places = list(accumulate(map(len, pieces)))
        spans = zip(answers, places[0:-1:2], places[1::2], strict=True)
        return [(self._ask_ends(messages[:i], text, begin), end) for i, begin, end in spans]

    def _ask_ends(self, before: Sequence[Message], text: str, begin: int) -> int:
        """Where the prompt for an answer ends, of which the words begin at `begin`: there, or before."""
        try:
            prompt = self._render(before, True) if before else ""
        except UnusableDialog:
            return begin
        return len(prompt) if prompt and len(prompt) <= begin and text.startswith(prompt) else begin


class _StandIns:
    """Characters of private use that no message holds, one for each control piece and two around answers."""

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
        used = {c for message in messages for c in message["content"]}
        free = (c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used)
        self.start, self.stop = islice(free, 2)
        pieces = sorted(map(tokenizer.piece, tokenizer.control), key=len, reverse=True)
        self._of = {piece: c for piece, c in zip(pieces, free, strict=False) if piece}
        self._back = str.maketrans({c: piece for piece, c in self._of.items()})

    def put(self, content: str) -> str:
        for piece, stand_in in self._of.items():
            content = content.replace(piece, stand_in)
        return content

    def take(self, text: str) -> str:
        return text.translate(self._back)


def _encode(tokenizer: Tokenizer, text: str, answers: list[tuple[int, int]], put_back: Callable[[str], str]) -> Encoded:
    """Encodes what the template wrote, with stand-ins, split at control tokens and at the edges of answers."""
    controls = list(tokenizer.find_controls(text))
    for n, (begin, end) in enumerate(answers):  # the next control token ends the answer if only blanks lie between
        after = next((c for c in controls if c[0] >= end), None)
        if after and not text[end : after[0]].strip():
            answers[n] = (begin, after[1])
    encoded = Encoded()
    takes_space = True

    def encode_words(begin: int, end: int) -> None:
        nonlocal takes_space
        edges = sorted({begin, end, *(edge for span in answers for edge in span if begin < edge < end)})
        for left, right in pairwise(edges):
            is_target = any(start <= left < stop for start, stop in answers)
            words = put_back(text[left:right])
            add = encoded.learned if is_target else encoded.given
            add(tokenizer.encode(words, leading_space=takes_space and not is_target))
            takes_space = False

    at = 0
    for begin, end, id in controls:
        encode_words(at, begin)
        add = encoded.learned if any(start <= begin < stop for start, stop in answers) else encoded.given
        add([id])
        at, takes_space = end, tokenizer.adds_space_after_control
    encode_words(at, len(text))
    return encoded


def _around_words(content: str, start: str, stop: str) -> str:
    """Puts marks around a content, inside the blanks around it, which a template may strip."""
    words = content.strip()
    return content.replace(words, f"{start}{words}{stop}", 1) if words else content


class _Generation(jinja2.ext.Extension):
    """Lets templates say `{% generation %} … {% endgeneration %}`, which writes what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Reads the block as its content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment in which transformers renders chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = tojson
    return environment
