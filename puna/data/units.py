"""One unit of preparing: a few megabytes of the sources become one shard, and one for the held-out documents.

Which bytes a unit holds, and so what its shards hold, depends on the sources alone; units may be worked on in any
order, by any process, and again after a crash. A unit is finished when its report is there, which is written last.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from puna.data import corpora
from puna.data.documents import Document, LeftOut, Span
from puna.data.infilling import cut_for_infilling, is_held_out
from puna.data.shards import WORK_FOLDER, ShardWriter, shard_entry, write_shard
from puna.files import write_json
from puna.prompts import ChatTemplate, Message, UnusableDialog, chat_template, infill_document
from puna.tokenizer import BulkEncoder, Tokenizer, load_tokenizer

#: The parts that documents go to, and the folder of each within the prepared folder.
PARTS = {"train": "", "held_out": "held_out"}

#: Bytes of documents that are encoded at once: enough to be fast, small in memory.
BATCH_BYTES = 1 << 20

#: Part, tokens, and which of them are targets; None: all.
_Encoded = tuple[str, NDArray[np.int32], NDArray[np.bool_] | None]


@dataclass(frozen=True)
class Unit:
    """What one process works on at a time.

    Attributes:
        number: in the order of the sources.
        spans: what to read.
        digest: of the spans, to know them again.
        copies: number of a document in the unit -> the document that it nearly is a copy of.
    """

    number: int
    spans: list[Span]
    digest: str
    copies: dict[int, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes to be read."""
        return sum(span.stop - span.start for span in self.spans)


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
        return _loaded, (self.kind, self.options, self.output / "tokenizer" / self.tokenizer.path.name, self.output)

    @cached_property
    def bulk(self) -> "_BulkTokenizer":
        """The tokenizer for plain text."""
        return _BulkTokenizer(self.tokenizer)

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
            for document, encoded in self._all_encoded(unit):
                if isinstance(encoded, LeftOut):
                    left_out.append(encoded)
                    continue
                assert isinstance(document, Document)
                part, tokens, is_target = encoded
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

    def _all_encoded(self, unit: Unit) -> Iterator[tuple[Document | LeftOut, _Encoded | LeftOut]]:
        """Every document with its tokens, or with why it is left out.

        Documents are laid out twice, some megabytes at a time: first to hear which texts there are to encode, so that
        they are encoded all at once.
        """
        for batch in _batches(self._documents(unit)):
            with self.bulk.listening():
                for document in batch:
                    if isinstance(document, Document):
                        self._encoded(document)
            for document in batch:
                yield document, document if isinstance(document, LeftOut) else self._encoded(document)
            self.bulk.forget()

    def _encoded(self, document: Document) -> _Encoded | LeftOut:
        """The part that a document goes to, its tokens, and which of them are targets."""
        part = "held_out" if is_held_out(document.id, self.options.get("held_out", 0.0)) else "train"
        if document.messages is not None:
            return self._encoded_dialog(part, document)
        if document.tokens is not None:
            return self._checked_tokens(part, document)
        assert document.text is not None
        cut = None
        if part == "train" and self.options.get("fim_rate"):
            rates = {name: self.options[name] for name in ("seed", "fim_rate", "spm_rate")}
            cut = cut_for_infilling(document.text, id=document.id, **rates)
        if cut is None:
            return part, self.bulk.encode_document(document.text), None
        as_tokenizer = cast(Tokenizer, self.bulk)
        tokens = infill_document(as_tokenizer, cut.prefix, cut.middle, cut.suffix, order=cut.order)
        return part, np.array(tokens, np.int32), None

    def _encoded_dialog(self, part: str, document: Document) -> _Encoded | LeftOut:
        assert self.template is not None
        assert document.messages is not None
        try:
            encoded = self.template.encode(cast(Tokenizer, self.bulk), cast(list[Message], document.messages))
        except UnusableDialog as error:
            detail = str(error).partition(f"{error.reason} (")[2].removesuffix(")")
            return LeftOut(document.id, document.source, error.reason, detail)
        if not any(encoded.is_target):
            return LeftOut(document.id, document.source, "nothing to learn", "no answer of the assistant")
        return part, np.array(encoded.tokens, np.int32), np.array(encoded.is_target, np.bool_)

    def _checked_tokens(self, part: str, document: Document) -> _Encoded | LeftOut:
        tokens, is_target = document.tokens, document.is_target
        assert tokens is not None
        assert is_target is not None
        size = self.tokenizer.vocab_size
        if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= size:
            detail = f"ids from {tokens.min()} to {tokens.max()}, the tokenizer has {size:,}"
            return LeftOut(document.id, document.source, "not of this vocabulary", detail)
        return part, tokens, is_target

    def _shard(self, part: str, unit: Unit) -> Path:
        return self.output / PARTS[part] / f"shard-{unit.number:05d}.arrow"


def _loaded(kind: str, options: dict[str, Any], tokenizer: Path, output: Path) -> PrepareUnit:
    return PrepareUnit(kind, options, load_tokenizer(tokenizer), output)


@dataclass
class SketchUnit:
    """Makes the sketches by which near-duplicates are found."""

    kind: str
    options: dict[str, Any]

    def __call__(self, unit: Unit) -> tuple[Unit, list[tuple[str, bool, np.ndarray]]]:
        """Id of every document, whether it is held out, and its sketch."""
        from puna.data.near_duplicates import Sketcher

        sketcher = Sketcher()
        share = self.options["held_out"]
        return unit, [
            (document.id, is_held_out(document.id, share), sketcher.sketch(document.text or ""))
            for document in read_unit(self.kind, self.options, unit)
            if isinstance(document, Document)
        ]


def read_unit(kind: str, options: dict[str, Any], unit: Unit) -> Iterator[Document | LeftOut]:
    """Reads the documents of a unit."""
    read = corpora.find(kind).read
    for span in unit.spans:
        yield from read(span, span.load(), options)


class _BulkTokenizer:
    """What layouts ask of a tokenizer, answered from what has been encoded ahead.

    While it is listening it gives no ids, and remembers which texts it was asked for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._encoder = tokenizer, BulkEncoder(tokenizer)
        self._heard: dict[bool, dict[str, NDArray[np.int32] | None]] = {True: {}, False: {}}
        self._is_listening = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, leading_space: bool = True) -> list[int]:
        ids = self._ids(text, leading_space).tolist()
        return [self._tokenizer.bos_id] * bos + ids + [self._tokenizer.eos_id] * eos

    def encode_document(self, text: str) -> NDArray[np.int32]:
        """BOS, the text, EOS."""
        ids = self._ids(text, leading_space=True)
        if self._is_listening:
            return ids
        tokens = np.empty(len(ids) + 2, np.int32)
        tokens[0], tokens[1:-1], tokens[-1] = self._tokenizer.bos_id, ids, self._tokenizer.eos_id
        return tokens

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Once the block has ended, all texts that were asked for in it are encoded."""
        self._is_listening = True
        yield
        self._is_listening = False
        for leading_space, heard in self._heard.items():
            heard.update(zip(heard, self._encoder.encode_all(list(heard), leading_space=leading_space), strict=True))

    def forget(self) -> None:
        """Gives up what has been encoded ahead."""
        for heard in self._heard.values():
            heard.clear()

    def _ids(self, text: str, leading_space: bool) -> NDArray[np.int32]:
        if self._is_listening:
            self._heard[leading_space][text] = None
            return _NO_IDS
        ids = self._heard[leading_space].get(text)
        return self._encoder.encode(text, leading_space=leading_space) if ids is None else ids


_NO_IDS = np.zeros(0, np.int32)


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
    texts = [document.text or ""] if document.messages is None else [m["content"] for m in document.messages]
    return sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
