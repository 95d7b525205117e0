"""What all chat templates share: messages in, ids and targets out, and one error for dialogs that do not fit."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from puna.errors import PunaError
from puna.tokenizer import Tokenizer


class Message(TypedDict):
    """One message; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


class UnusableDialog(PunaError):
    """A dialog that a template cannot lay out.

    Attributes:
        reason: one of a few fixed short strings, so that reasons can be counted.
        detail: what is wrong in this dialog, or empty.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"this dialog cannot be laid out: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Pickles both parts, for the way back from a worker process."""
        return type(self), (self.reason, self.detail)


@dataclass
class Encoded:
    """A dialog as the model sees it.

    Attributes:
        tokens: ids.
        is_target: for each id, whether it is to be learned: the assistant's words and what ends them.
    """

    tokens: list[int] = field(default_factory=list)
    is_target: list[bool] = field(default_factory=list)

    def given(self, ids: Iterable[int]) -> None:
        """Appends ids that the model is given."""
        self._append(ids, False)

    def learned(self, ids: Iterable[int]) -> None:
        """Appends ids that the model is to produce."""
        self._append(ids, True)

    @property
    def last_target(self) -> int:
        """The id that ends the last answer.

        Raises:
            ValueError: there is no answer.
        """
        return self.tokens[max(i for i, is_target in enumerate(self.is_target) if is_target)]

    def _append(self, ids: Iterable[int], is_target: bool) -> None:
        before = len(self.tokens)
        self.tokens.extend(ids)
        self.is_target.extend([is_target] * (len(self.tokens) - before))


class ChatTemplate(ABC):
    """A layout of dialogs.

    Attributes:
        name: as `chat_template` knows it.
        jinja: the layout in Jinja, as models ship theirs, or None; models tuned on the layout are exported with it.
        digest: a hash of a layout that comes from files, which may be edited; None for those that come with puna.
        stop_strings: texts that end an answer, beside the ids of `stops`.
    """

    name: str
    digest: str | None = None
    jinja: str | None = None
    stop_strings: tuple[str, ...] = ()

    @abstractmethod
    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        """Lays out a dialog; if the user has the last word, as the prompt for the answer.

        Raises:
            UnusableDialog: the dialog does not fit the layout.
            PunaError: the vocabulary lacks what the layout needs.
        """

    def stops(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer."""
        return (tokenizer.eos_id,)


@dataclass(frozen=True)
class Dialog:
    """A checked dialog: questions and answers in turn.

    Attributes:
        system: what the system message says, or None.
        turns: (question, answer) pairs; the last answer is None where it is asked for.
    """

    system: str | None
    turns: list[tuple[str, str | None]]


def read_dialog(messages: Sequence[Message]) -> Dialog:
    """Checks that messages are an optional system message, then user and assistant in turn, none of them empty.

    Raises:
        UnusableDialog: they are not.
    """
    read_messages(messages)
    has_system = bool(messages) and messages[0]["role"] == "system"
    spoken = messages[1:] if has_system else messages
    if not spoken:
        raise UnusableDialog("no messages")
    if spoken[0]["role"] == "assistant":
        raise UnusableDialog("does not begin with the user")
    for i, message in enumerate(spoken):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise UnusableDialog("roles do not alternate", f"message {i + 1 + has_system} is from {message['role']}")
        if not message["content"].strip():
            raise UnusableDialog("empty question")
    contents = [message["content"] for message in spoken]
    answers: list[str | None] = [*contents[1::2], None][: len(contents[::2])]
    return Dialog(messages[0]["content"] if has_system else None, list(zip(contents[::2], answers, strict=True)))


def read_messages(messages: Sequence[Message]) -> None:
    """Checks what holds for every template: known roles, texts, and no empty answer.

    Raises:
        UnusableDialog: there are no messages, or one is not like that.
    """
    if not messages:
        raise UnusableDialog("no messages")
    for message in messages:
        if message.get("role") not in ("system", "user", "assistant"):
            raise UnusableDialog("unknown role", f'{message.get("role")!r}; roles are "system", "user" and "assistant"')
        if not isinstance(message.get("content"), str):
            raise UnusableDialog("content is not text")
        if message["role"] == "assistant" and not message["content"].strip():
            raise UnusableDialog("empty answer")


def only_turn(messages: Sequence[Message]) -> tuple[str, str | None]:
    """The question and answer of a dialog that has one turn and no system message.

    Raises:
        UnusableDialog: it has more.
    """
    dialog = read_dialog(messages)
    if dialog.system is not None:
        raise UnusableDialog("no place for a system message")
    if len(dialog.turns) > 1:
        raise UnusableDialog("more than one turn")
    return dialog.turns[0]
