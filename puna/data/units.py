"""One unit of preparing: a few megabytes of the sources become one shard, and one for the held-out documents.

Which bytes a unit holds, and so what its shards hold, depends on the sources alone; units may be worked on in any
order, by any process, and again after a crash. A unit is finished when its report is there, which is written last.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from puna.data import corpora
from puna.data.documents import Document, LeftOut, Span
from puna.data.drafts import DraftTokenizer
from puna.data.infilling import Cut, cut_for_infilling, draw
from puna.data.shards import WORK_FOLDER, ShardWriter, shard_entry, write_shard
from puna.files import write_json
from puna.prompts import ChatTemplate, Encoded, UnusableDialog, chat_template, infill_document
from puna.tokenizer import Tokenizer, load_tokenizer

#: The parts that documents go to, and the folder of each within the prepared folder.
PARTS = {"train": "", "held_out": "held_out"}

#: Bytes of documents that are encoded at once: enough to be fast, small in memory.
BATCH_BYTES = 1 << 21


@dataclass(frozen=True)
class Unit:
    """What one process works on at a time.

    Attributes:
        number: in the order of the sources.
        spans: what to read.
        digest: of the spans and copies; another one means that the sources changed.
        copies: number of a document in the unit -> id of the document that it is nearly a copy of.
    """

    number: int
    spans: list[Span]
    digest: str
    copies: dict[int, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes to be read."""
        return sum(span.stop - span.start for span in self.spans)

    def without(self, copies: dict[int, str]) -> "Unit":
        """The same unit without these documents."""
        if not copies:
            return self
        told = f"{self.digest}\n{json.dumps(sorted(copies.items()))}"
        return replace(self, copies=copies, digest=xxhash.xxh3_128_hexdigest(told.encode()))


def report_path(output: Path, number: int) -> Path:
    """Where the report of a finished unit is."""
    return output / WORK_FOLDER / f"unit-{number:05d}.json"


@dataclass
class PrepareUnit:
    """Turns units into shards; a callable that travels to worker processes.

    Args:
        kind: of the corpus.
        options: all of them, see `corpora.checked_options`.
        tokenizer: a copy of it is in the prepared folder, which worker processes load.
        output: the prepared folder.
    """

    kind: str
    options: dict[str, Any]
    tokenizer: Tokenizer
    output: Path

    def __reduce__(self) -> tuple[Any, ...]:
        tokenizer = self.output / "tokenizer" / self.tokenizer.path.name
        return _loaded, (self.kind, self.options, tokenizer, self.tokenizer.vocab_size, self.output)

    @cached_property
    def draft_tokenizer(self) -> DraftTokenizer:
        """The tokenizer that layouts ask."""
        return DraftTokenizer(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The layout of dialogs, for kinds that have them."""
        return chat_template(self.options["template"]) if "template" in self.options else None

    def __call__(self, unit: Unit) -> Unit:
        """Writes the unit's shards and then its report."""
        texts: Counter[str] = Counter()
        languages: dict[str, list[int]] = {}
        left_out: list[LeftOut] = []
        writers: dict[str, ShardWriter] = {}
        with contextlib.ExitStack() as stack:
            for encoded in self._all_encoded(unit):
                if isinstance(encoded, LeftOut):
                    left_out.append(encoded)
                    continue
                document, part, tokens, is_target = encoded
                if part not in writers:
                    path = self._shard(part, unit)
                    writers[part] = stack.enter_context(write_shard(path, dialogs=is_target is not None))
                writers[part].add(document.id, document.source, tokens, is_target)
                size = _size_bytes(document)
                texts[part] += size
                if document.language is not None and part == "train":
                    count = languages.setdefault(document.language, [0, 0])
                    languages[document.language] = [count[0] + 1, count[1] + size]
        report = {
            "digest": unit.digest,
            "shards": {part: shard_entry(self._shard(part, unit), writer) for part, writer in writers.items()},
            "bytes": texts,
            "languages": languages,
            "left_out": [asdict(refused) for refused in left_out],
        }
        write_json(report_path(self.output, unit.number), report)
        return unit

    def _documents(self, unit: Unit) -> Iterator[Document | LeftOut]:
        number = 0
        for document in read_unit(self.kind, self.options, unit):
            if isinstance(document, Document):
                original, number = unit.copies.get(number), number + 1
                if original is not None:
                    document = LeftOut(document.id, document.source, "near-duplicate", original)
            yield document

    def _all_encoded(self, unit: Unit) -> "Iterator[_WithTokens | LeftOut]":
        """Every document with its tokens, or why it is left out; the texts of a batch are encoded at once."""
        for batch in _batches(self._documents(unit)):
            drafts = [document if isinstance(document, LeftOut) else self._drafted(document) for document in batch]
            filled = self.draft_tokenizer.fill([draft.layout for draft in drafts if isinstance(draft, _Draft)])
            for draft in drafts:
                yield self._filled(draft.document, *next(filled)) if isinstance(draft, _Draft) else draft

    def _drafted(self, document: Document) -> "_Draft | _WithTokens | LeftOut":
        """A document laid out, its texts not yet encoded; or its tokens if it has come with them."""
        if document.messages is not None:
            return self._drafted_dialog(document)
        if document.tokens is not None:
            return self._checked_tokens(document)
        assert document.text is not None
        tokenizer, cut = cast(Tokenizer, self.draft_tokenizer), self._cut(document)
        if cut is None:
            return _Draft(document, Encoded(tokenizer.encode(document.text, bos=True, eos=True)))
        laid_out = infill_document(tokenizer, cut.prefix, cut.middle, cut.suffix, order=cut.order)
        return _Draft(document, Encoded(laid_out))

    def _cut(self, document: Document) -> Cut | None:
        """The parts of a document that is laid out for infilling, if its tokens are not too many."""
        if not self.options.get("fim_rate") or document.text is None or self._part(document) != "train":
            return None
        rates = {name: self.options[name] for name in ("seed", "fim_rate", "spm_rate")}
        return cut_for_infilling(document.text, id=document.id, **rates)

    def _drafted_dialog(self, document: Document) -> "_Draft | LeftOut":
        assert self.template is not None
        assert document.messages is not None
        try:
            tokenizer = cast(Tokenizer, self.draft_tokenizer)
            return _Draft(document, self.template.encode(tokenizer, document.messages))
        except UnusableDialog as error:
            return LeftOut(document.id, document.source, error.reason, error.detail)

    def _filled(
        self, document: Document, tokens: NDArray[np.int32], is_target: NDArray[np.bool_] | None
    ) -> "_WithTokens | LeftOut":
        if is_target is not None and not is_target.any():
            return LeftOut(document.id, document.source, "nothing to learn", "no answer of the assistant")
        if len(tokens) > self.options.get("fim_tokens", len(tokens)) and self._cut(document) is not None:
            assert document.text is not None
            tokens = np.array(self.tokenizer.encode(document.text, bos=True, eos=True), np.int32)
        return _WithTokens(document, self._part(document), tokens, is_target)

    def _part(self, document: Document) -> str:
        """Where a document goes."""
        return "held_out" if is_held_out(document, self.kind, self.options.get("held_out", 0.0)) else "train"

    def _checked_tokens(self, document: Document) -> "_WithTokens | LeftOut":
        tokens, is_target = document.tokens, document.is_target
        assert tokens is not None
        assert is_target is not None
        size = self.tokenizer.vocab_size
        if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= size:
            detail = f"ids from {tokens.min()} to {tokens.max()}, the tokenizer has {size:,}"
            return LeftOut(document.id, document.source, "not of this vocabulary", detail)
        return _WithTokens(document, self._part(document), tokens, is_target)

    def _shard(self, part: str, unit: Unit) -> Path:
        return self.output / PARTS[part] / f"shard-{unit.number:05d}.arrow"


class _Draft(NamedTuple):
    """A document laid out, with numbers in place of the ids of its texts (see `DraftTokenizer`)."""

    document: Document
    layout: Encoded


class _WithTokens(NamedTuple):
    """A document, the part that it goes to, its tokens, and which of them are targets; None: all."""

    document: Document
    part: str
    tokens: NDArray[np.int32]
    is_target: NDArray[np.bool_] | None


def _loaded(kind: str, options: dict[str, Any], path: Path, vocab_size: int, output: Path) -> PrepareUnit:
    tokenizer = load_tokenizer(path)
    tokenizer.check_vocab_size(vocab_size)
    return PrepareUnit(kind, options, tokenizer, output)


@dataclass
class SketchUnit:
    """Makes the sketches by which near-duplicates are found."""

    kind: str
    options: dict[str, Any]

    def __call__(self, unit: Unit) -> tuple[Unit, list[tuple[str, bool, np.ndarray]]]:
        """Id of every document, whether it is held out, and its sketch."""
        from puna.data.near_duplicates import sketch

        share = self.options["held_out"]
        return unit, [
            (document.id, is_held_out(document, self.kind, share), sketch(document.text or ""))
            for document in read_unit(self.kind, self.options, unit)
            if isinstance(document, Document)
        ]


def read_unit(kind: str, options: dict[str, Any], unit: Unit) -> Iterator[Document | LeftOut]:
    """The documents of a unit, read from its spans."""
    read = corpora.find(kind).read
    for span in unit.spans:
        yield from read(span, span.load(), options)


def is_held_out(document: Document, kind: str, share: float) -> bool:
    """Whether a document is kept from training.

    It depends on the document alone, so that new ones move none: on its id, so that a file stays on its side when it is
    edited; of a kind that may hold a document twice, on what it says, so that no copy of a held-out one is trained on.

    Args:
        document: of a source.
        kind: of its corpus.
        share: of all documents.
    """
    if share == 0:
        return False
    return draw(0, document.id if corpora.find(kind).DISTINCT else _digest(document), "held out") < share


def _digest(document: Document) -> str:
    """A hash of what a document says."""
    if document.tokens is not None:
        return xxhash.xxh3_128_hexdigest(document.tokens.tobytes())
    said = json.dumps(document.messages) if document.text is None else document.text
    return xxhash.xxh3_128_hexdigest(said.encode())


def _batches(documents: Iterator[Document | LeftOut]) -> Iterator[list[Document | LeftOut]]:
    """Documents in lists of about `BATCH_BYTES`."""
    held, size = list[Document | LeftOut](), 0
    for document in documents:
        held.append(document)
        size += _size_bytes(document) if isinstance(document, Document) else 0
        if size >= BATCH_BYTES:
            yield held
            held, size = [], 0
    yield held


def _size_bytes(document: Document) -> int:
    if document.tokens is not None:
        return document.tokens.nbytes
    return sum(len(text) if text.isascii() else len(text.encode()) for text in _texts(document))


def _texts(document: Document) -> list[str]:
    return [document.text or ""] if document.messages is None else [m["content"] for m in document.messages]
