"""What every tokenizer can do, given only how its backend splits plain text.

A backend supplies a table of pieces with the bytes that each spells, the set of control ids, and `_split`. Everything
that must be the same for all of them lives here: specials around a text, decoding, streaming, and the check against a
model's vocabulary.
"""

import codecs
import re
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from puna.errors import PunaError
from puna.files import file_aside, sha256_of

#: SentencePiece's sign for a space inside a piece.
SPACE_MARK = "\u2581"

#: The last sixteen pieces of Code Llama's vocabulary, in the order of their ids (32000 to 32015). Four are used; the
#: others are there because the vocabulary is merged pair by pair. Source: facebookresearch/codellama's tokenizer.model.
INFILLING_PIECES = tuple(
    SPACE_MARK + piece
    for piece in ["<SU", "<SUF", "<PRE", "<M", "<MID", "<E", "<EOT", "<PRE>", "<SUF>", "<MID>", "<EOT>"]
    + ["<EOT>" * count for count in range(2, 7)]
)

#: What ends each message of Code Llama 70B Instruct.
STEP_PIECE = "<step>"

#: Control pieces, whatever type a vocabulary's file gives them.
MARKERS = frozenset((*INFILLING_PIECES, STEP_PIECE))

#: The layout of dialogs that a model ships, in Jinja.
TEMPLATE_FILE = "chat_template.jinja"

#: How the maker of a model lets it choose tokens: sampling, padding, and ids that end a text.
GENERATION_FILE = "generation_config.json"

#: Files that belong to a tokenizer, or like the layout of dialogs to its model, and travel with it.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
    GENERATION_FILE,
)


@dataclass(frozen=True)
class Infilling:
    """The ids that lay out an infilling prompt; only a vocabulary that has all four can infill."""

    prefix_id: int
    suffix_id: int
    middle_id: int
    eot_id: int


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: ids are 0 to vocab_size - 1.
        bos_id, eos_id: begin and end of a document; where a vocabulary has no BOS, its EOS serves as both.
        unk_id: the id of what cannot be spelled; None where every byte can.
        infilling: the four markers, or None where the vocabulary lacks one.
        step_id: the id of `<step>`, or None.
        sha256: of the vocabulary's file; data and models that share it share their ids.
        adds_leading_space: whether `encode` puts a space in front of a text unless told not to.
        control: ids that no text can produce.
        byte_ids: byte -> the id that spells it alone, where the vocabulary spells unknown characters so; else empty.
        merges_plain_text: whether a text is split by merging neighbours into pieces of the vocabulary, and nothing else
            is done to it, so that it may be split part by part (see `BulkEncoder`).
        adds_space_after_control: whether transformers' version of this tokenizer, given one string with control tokens
            written out, puts the leading space after each of them too (see `prompts.jinja`).
    """

    def __init__(
        self,
        path: Path,
        *,
        pieces: list[str],
        spellings: list[bytes],
        control: Iterable[int],
        bos_id: int,
        eos_id: int,
        unk_id: int | None,
        adds_leading_space: bool,
        byte_ids: dict[int, int],
        merges_plain_text: bool,
        adds_space_after_control: bool,
        control_strips: Mapping[int, tuple[bool, bool]] | None = None,
    ) -> None:
        """Takes the backend's tables: `pieces` as the vocabulary writes them, `spellings` the bytes they stand for."""
        self.path, self.sha256 = path, sha256_of(path)
        self.bos_id, self.eos_id, self.unk_id = bos_id, eos_id, unk_id
        self.adds_leading_space = adds_leading_space
        self.control = frozenset(control)
        self.byte_ids, self.merges_plain_text = byte_ids, merges_plain_text
        self.adds_space_after_control = adds_space_after_control
        self._control_strips = control_strips or {}
        self._pieces, self._spellings = pieces, spellings
        self._ids = {piece: i for i, piece in enumerate(pieces) if piece}
        self._use_markers()

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._pieces)

    @property
    def spellings(self) -> Sequence[bytes]:
        """The bytes that each id spells; none for a control id."""
        return tuple(self._spellings)

    @abstractmethod
    def _split(self, texts: Sequence[str], leading_space: bool) -> list[list[int]]:
        """The ids of each text, none of them a control id."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, leading_space: bool = True) -> list[int]:
        """The ids of a text; control ids only where `bos` and `eos` ask for them.

        Args:
            text: any text that UTF-8 can spell.
            bos: put BOS in front.
            eos: put EOS at the end.
            leading_space: whether a tokenizer that puts a space in front of a text does so. False is for text in the
                middle of a line: the suffix and the middle of infilling, an answer after its prompt.

        Raises:
            PunaError: the text holds half of a surrogate pair.
        """
        return self.encode_batch([text], bos=bos, eos=eos, leading_space=leading_space)[0]

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, eos: bool = False, leading_space: bool = True
    ) -> list[list[int]]:
        """`encode` of each text."""
        try:
            if self.byte_ids and any(SPACE_MARK in text for text in texts):
                rows = [self._split_around_marks(text, leading_space) for text in texts]
            else:
                rows = self._split(texts, leading_space)
        except (RuntimeError, TypeError):
            for text in texts:
                _refuse_surrogates(text)
            raise
        if bos or eos:
            before, after = [self.bos_id] * bos, [self.eos_id] * eos
            rows = [before + row + after for row in rows]
        return rows

    def decode(self, ids: Iterable[int], *, leading_space: bool = True) -> str:
        """The text of the ids, without control tokens; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: any ids of the vocabulary.
            leading_space: whether the ids were encoded so; the space that was put in front is then removed. False
                keeps a first space: the ids continue a text.

        Raises:
            PunaError: an id is outside the vocabulary.
        """
        return self.decode_bytes(ids, leading_space=leading_space).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, leading_space: bool = True) -> bytes:
        """The bytes of the ids; see `decode`."""
        spelled = b"".join([self._spelling(i) for i in ids])
        return spelled[1:] if leading_space and self.adds_leading_space and spelled[:1] == b" " else spelled

    def stream(self, *, skip_bytes: int = 0) -> "StreamDecoder":
        """A decoder that takes one id at a time, of ids that continue a prompt: a first space is kept.

        Args:
            skip_bytes: how many of the ids' first bytes are left out of the text.
        """
        return StreamDecoder(self, skip_bytes)

    def ids_along(self, text: bytes) -> list[int]:
        """Ids with which a text that begins with `text` can begin: each spells a start of it, or all of it and more.

        For `b"imp"`: i, im, imp, import and so on, where the vocabulary has them; no control id.
        """
        table, found = self._sorted_spellings, []
        for end in range(1, len(text) + 1):
            for at in range(bisect_left(table, (text[:end],)), len(table)):
                spelling, id = table[at]
                if not spelling.startswith(text[:end]) or len(spelling) > end < len(text):
                    break
                found.append(id)
        return found

    def has_piece_beyond(self, text: bytes) -> bool:
        """Whether one id spells all of `text` and more."""
        table = self._sorted_spellings
        behind = bisect_right(table, (text, self.vocab_size))
        return behind < len(table) and table[behind][0].startswith(text)

    def piece(self, id: int) -> str:
        """The piece as the vocabulary writes it, for display."""
        self._check(id)
        return self._pieces[id]

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, control pieces included; None if the vocabulary lacks it."""
        return self._ids.get(piece)

    def find_controls(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Start, stop and id of each control piece that is written out in a text.

        Only for text that puna or a template wrote, never for text from users. Start and stop include the blanks beside
        a piece where the vocabulary says that it takes them along.
        """
        before = 0
        for match in self._control_pattern.finditer(text):
            (start, stop), id = match.span(), self._ids[match[0]]
            takes_left, takes_right = self._control_strips.get(id, (False, False))
            while takes_left and start > before and text[start - 1].isspace():
                start -= 1
            while takes_right and stop < len(text) and text[stop].isspace():
                stop += 1
            before = stop
            yield start, stop, id

    def check_vocab_size(self, vocab_size: int) -> None:
        """Makes sure that a model with this many embeddings has one for every id that can come out of `encode`.

        More embeddings than ids are fine (models pad them). Fewer are fine only if nothing but unused control pieces
        lies beyond: those are then dropped from this tokenizer, and with them `infilling` and `step_id`. That is the
        case of the Hugging Face folders of Code Llama 34B and Python: transformers added the infilling markers to
        their tokenizers, giving them 32,004 ids, while the models have 32,000 embeddings and cannot infill.

        Raises:
            PunaError: ordinary text, BOS or EOS could give an id that the model does not have.
        """
        if vocab_size >= self.vocab_size:
            return
        used = [
            i for i in range(vocab_size, self.vocab_size) if i not in self.control or i in (self.bos_id, self.eos_id)
        ]
        if used:
            raise PunaError(
                f"{self.path} gives ids up to {max(used)} ({self._pieces[max(used)]!r}) but the model's vocab_size is "
                f"{vocab_size}; use the tokenizer that the model was trained with"
            )
        for piece in self._pieces[vocab_size:]:
            self._ids.pop(piece, None)
        del self._pieces[vocab_size:], self._spellings[vocab_size:]
        self.control = frozenset(i for i in self.control if i < vocab_size)
        self.__dict__.pop("_control_pattern", None)
        self._use_markers()

    def save(self, folder: Path | str) -> None:
        """Copies the tokenizer's own files, and those that travel with it, into a folder, unchanged."""
        folder = Path(folder)
        names = {self.path.name, *TOKENIZER_FILES}
        for source in sorted(self.path.with_name(name) for name in names):
            if source.is_file():
                content = source.read_bytes()
                with file_aside(folder / source.name) as file:
                    file.write(content)
        if sha256_of(folder / self.path.name) != self.sha256:
            raise PunaError(f"{self.path} has changed since it was loaded; load it again")

    def _split_around_marks(self, text: str, leading_space: bool) -> list[int]:
        """Splits a text that holds U+2581, which the backend would read as a space.

        A character that is in no piece takes its place; its three byte pieces are then replaced by those of U+2581.
        """
        characters = frozenset(text).union(*self._pieces)
        stand_in = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in characters)
        ids = self._split([text.replace(SPACE_MARK, stand_in)], leading_space)[0]
        find, put = ([self.byte_ids[byte] for byte in character.encode()] for character in (stand_in, SPACE_MARK))
        for at in range(len(ids) - 2):
            if ids[at : at + 3] == find:
                ids[at : at + 3] = put
        return ids

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        pieces = filter(None, (self._pieces[i] for i in self.control))
        return re.compile("|".join(map(re.escape, sorted(pieces, key=len, reverse=True))) or "(?!)")

    @cached_property
    def _sorted_spellings(self) -> list[tuple[bytes, int]]:
        """The bytes that each id of text spells, and the id, sorted."""
        silent = {*self.control, self.unk_id}
        return sorted((spelling, i) for i, spelling in enumerate(self._spellings) if spelling and i not in silent)

    def _use_markers(self) -> None:
        ids = [i for name in ("PRE", "SUF", "MID", "EOT") if (i := self.id_of(f"{SPACE_MARK}<{name}>")) is not None]
        self.infilling = Infilling(*ids) if len(ids) == 4 else None
        self.step_id = self.id_of(STEP_PIECE)

    def _check(self, id: int) -> None:
        if not 0 <= id < len(self._pieces):
            raise PunaError(f"token id {id} is outside the vocabulary of {self.path} (0 to {self.vocab_size - 1})")

    def _spelling(self, id: int) -> bytes:
        self._check(id)
        return self._spellings[id]


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PunaError(
            f"the text holds U+{ord(text[error.start]):04X} at character {error.start}, half of a surrogate pair, "
            'which UTF-8 cannot encode; read its file with errors="replace" or leave it out'
        ) from None


class StreamDecoder:
    """Decodes ids that come one by one: always whole characters, in total what `decode(leading_space=False)` gives."""

    def __init__(self, tokenizer: Tokenizer, skip_bytes: int) -> None:
        self._spelling = tokenizer._spelling
        self._skip_bytes = skip_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that this id completes; empty while one is half there."""
        spelled = self._spelling(id)
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(spelled))
            spelled, self._skip_bytes = spelled[skipped:], self._skip_bytes - skipped
        return self._utf8.decode(spelled)

    def finish(self) -> str:
        """What is left: nothing, or U+FFFD for a character that is incomplete."""
        return self._utf8.decode(b"", final=True)
