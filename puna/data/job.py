"""What is to be prepared: sources, options, tokenizer and layout, checked; and what looking at the sources finds."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from puna.data import corpora
from puna.data.documents import LeftOut, Span, checksum, is_spellable
from puna.data.shards import WORK_FOLDER
from puna.data.units import SketchUnit, Unit
from puna.data.workers import Workers
from puna.errors import PunaError, UsageError
from puna.files import file_aside, read_json, write_json
from puna.progress import Progress, say
from puna.prompts import ChatTemplate, Encoded, Message, chat_template, infill_document
from puna.prompts.templates import with_specials_of
from puna.tokenizer import Tokenizer, load_tokenizer
from puna.tokenizer.base import TEMPLATE_FILE

#: The model's, which may lie beside its tokenizer.
CONFIG_FILE = "config.json"

#: Lists what was left out, one JSON object a line.
LEFT_OUT_FILE = "left_out.jsonl"

#: Bytes of a unit: small at first, so that all processes soon have work; larger in a large corpus, so that its shards
#: are few. The size of unit n is a function of n, so that units do not depend on what comes after them.
SMALLEST_UNIT, LARGEST_UNIT, UNITS_OF_A_SIZE = 2_000_000, 64_000_000, 32


class Job:
    """What is to be prepared, and what looking at it has found.

    Args:
        kind: of the sources.
        sources: files or folders, one or several.
        output: the folder to make.
        tokenizer: file or folder.
        options: those that were given.

    Attributes:
        settings: all that the result depends on, apart from what the sources hold.
        sources: path -> number of files, bytes and a hash of what is in each source; filled by `spans`.
        copies: unit -> number of a document in it -> id of the document of which it is nearly a copy.

    Raises:
        UsageError: no source, or no such kind, option or layout.
        PunaError: a source is missing, or the tokenizer is, or lacks what the layout needs.
    """

    def __init__(self, kind: str, sources: Any, output: Path, tokenizer: Path, options: dict[str, Any]) -> None:
        self.kind, self.output, self.tokenizer = kind, output, _tokenizer_of(tokenizer)
        self.options = corpora.checked_options(kind, options)
        paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
        if not paths:
            raise UsageError("name at least one source")
        self.paths = [Path(path).resolve() for path in paths]
        for path in self.paths:
            if not path.exists():
                raise PunaError(f"{path} does not exist")
            if not is_spellable(str(path)):
                raise PunaError(f"{str(path)!r} is not UTF-8, so that dataset.json cannot hold it; rename it")
        name = self.options.get("template")
        self.template = None if name is None else _checked_layout(name, self.tokenizer)
        if self.options.get("fim_rate"):
            infill_document(self.tokenizer, "", "", "", order="psm")  # an error if the tokenizer has no markers
        self.settings: dict[str, Any] = {
            "kind": kind,
            "sources": [str(path) for path in self.paths],
            "tokenizer": self.tokenizer.sha256,
            "options": self.options,
        }
        # What files beside the named ones say, which may be edited between two calls:
        if self.tokenizer.path.suffix == ".json":
            self.settings |= {"bos_id": self.tokenizer.bos_id, "eos_id": self.tokenizer.eos_id}
        if self.template is not None and self.template.digest:
            self.settings |= {"template_digest": self.template.digest}
        self.sources: dict[str, dict[str, Any]] = {}
        self.copies: dict[int, dict[int, str]] = {}

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer's files, and the layout of dialogs if it is known in Jinja."""
        self.tokenizer.save(folder)
        if self.tokenizer.path.suffix == ".json" and self.tokenizer.path.with_name(CONFIG_FILE).is_file():
            # The model's config.json, which may be the only file that says them, is not copied.
            ids = {"bos_token_id": self.tokenizer.bos_id, "eos_token_id": self.tokenizer.eos_id}
            write_json(folder / CONFIG_FILE, ids)
        if self.template is not None and self.template.jinja is not None:
            with file_aside(folder / TEMPLATE_FILE, "w") as file:
                file.write(self.template.jinja)

    def withdraw(self) -> None:
        """Removes what a job without results has made; not its folder if that is a link, in use, or has folders."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.output / "tokenizer", ignore_errors=True)
        with contextlib.suppress(OSError):
            self.output.rmdir()

    @property
    def work(self) -> Path:
        """The folder that is there until all is done."""
        return self.output / WORK_FOLDER

    def look(self, *, start_processes: Callable[[], None], worth_starting: int) -> tuple[int, int]:
        """Cuts the sources into units and writes them to plan.jsonl.

        Args:
            start_processes: called once there are more units than `worth_starting`.
            worth_starting: how many units this process can do alone.

        Returns:
            How many bytes there are to read, and how many units.
        """
        total = count = 0
        with (
            file_aside(self.work / "plan.jsonl", "w", sync=False) as plan,
            file_aside(self.work / LEFT_OUT_FILE, "w", sync=False) as left_out,
            Progress("looking at the sources", unit="MB") as progress,
        ):
            for unit in cut_into_units(self._spans_to_read(left_out)):
                if unit.number == worth_starting:
                    start_processes()
                count, total = count + 1, total + unit.size_bytes
                progress.advance(unit.size_bytes / 1e6)
                plan.write(json.dumps(asdict(unit)) + "\n")
        return total, count

    def units(self) -> Iterator[Unit]:
        """The units of the plan."""
        with open(self.work / "plan.jsonl", encoding="utf-8") as plan:
            for line in plan:
                fields = json.loads(line)
                unit = Unit(fields["number"], [Span(**span) for span in fields["spans"]], fields["digest"])
                yield unit.without(self.copies.get(unit.number, {}))

    def find_near_duplicates(self, count: int, size_bytes: int) -> None:
        """Finds the documents that are nearly copies of others, which `units` then leaves out."""
        from puna.data.near_duplicates import near_copies

        found: list[tuple[bool, int, int, str, np.ndarray]] = []
        with (
            Workers(SketchUnit(self.kind, self.options), count) as pool,
            Progress("comparing", size_bytes / 1e6, "MB") as progress,
        ):
            for unit, sketches in pool.map(self.units()):
                found += [(not held, unit.number, i, id, hashes) for i, (id, held, hashes) in enumerate(sketches)]
                progress.advance(unit.size_bytes / 1e6)
        found.sort(key=lambda document: document[:3])  # held-out documents first, then as they stand in the sources
        for copy, original in near_copies((i, document[-1]) for i, document in enumerate(found)):
            _, unit_number, number, _, _ = found[copy]
            self.copies.setdefault(unit_number, {})[number] = found[original][3]

    def spans(self) -> Iterator[Span | LeftOut]:
        """What there is to read in all sources; what was there before is left out."""
        corpus = corpora.find(self.kind)
        self.sources = {}
        seen = Seen()
        for path in self.paths:
            digest, files, size = xxhash.xxh3_128(), 0, 0
            for span in corpus.spans(path, self.options):
                if isinstance(span, Span):
                    digest.update(f"{span.id}\n{span.start}\n{span.checksum}\n".encode())
                    files, size = files + (span.start == 0), size + span.stop - span.start
                    place = f"{span.path}\n{span.start}"  # sources may overlap, and one shard may bring all along
                    if not seen.is_new(int(span.checksum if corpus.DISTINCT else checksum(os.fsencode(place)), 16)):
                        reason = "exact duplicate" if corpus.DISTINCT else "named twice"
                        span = LeftOut(span.id, span.source, reason)
                yield span
            self.sources[str(path)] = {"files": files, "bytes": size, "xxh3_128": digest.hexdigest()}

    def _spans_to_read(self, left_out: IO[str]) -> Iterator[Span]:
        """The spans; what is left out is written to the file."""
        for span in self.spans():
            if isinstance(span, Span):
                yield span
            else:
                left_out.write(json.dumps(asdict(span), ensure_ascii=False) + "\n")


def cut_into_units(spans: Iterator[Span]) -> Iterator[Unit]:
    """Puts spans together until they reach the size of the unit."""
    number, held, size = 0, list[Span](), 0
    for span in spans:
        held.append(span)
        size += span.stop - span.start
        if size >= min(SMALLEST_UNIT << (number // UNITS_OF_A_SIZE), LARGEST_UNIT):
            yield _unit(number, held)
            number, held, size = number + 1, [], 0
    if held:
        yield _unit(number, held)


class Seen:
    """A set of 64-bit hashes that takes eight bytes each: a small Python set, emptied into sorted arrays.

    Among ten million files, one is taken for a copy by mistake with probability 3e-6.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._older: list[np.ndarray] = []

    def is_new(self, value: int) -> bool:
        """Adds the hash; returns whether it is new."""
        key = np.uint64(value)
        if value in self._recent or any(_holds(array, key) for array in self._older):
            return False
        self._recent.add(value)
        if len(self._recent) == 1 << 16:
            array = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._recent.clear()
            while self._older and len(self._older[-1]) <= len(array):
                array = np.concatenate([array, self._older.pop()])
            self._older.append(np.sort(array))
        return True


def _tokenizer_of(path: Path) -> Tokenizer:
    """Opens a tokenizer; one in a model's folder without control pieces that the model has no embeddings for."""
    tokenizer = load_tokenizer(path)
    config = tokenizer.path.with_name(CONFIG_FILE)
    size = read_json(config).get("vocab_size") if config.is_file() else None
    if isinstance(size, int):
        tokenizer.check_vocab_size(size)
    return tokenizer


def _checked_layout(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The layout of dialogs, tried on one.

    Raises:
        PunaError: the vocabulary lacks what it needs, or its files would make another layout of it.
    """
    template = chat_template(name)
    dialog = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    encoded = template.encode(tokenizer, dialog)
    if template.digest and with_specials_of(template, tokenizer).encode(tokenizer, dialog) != encoded:
        raise PunaError(
            f"the layout of {template.name} writes BOS or EOS otherwise than the files of {tokenizer.path}, "
            "with which a tuned model would ship it; give the tokenizer of the layout's folder"
        )
    if not template.digest and _own_layout(tokenizer, dialog) not in (None, encoded):
        say(
            f"{tokenizer.path.parent} ships another layout of dialogs than {name}; to take that, give --template "
            f"{tokenizer.path.parent}"
        )
    if encoded.last_target not in {*tokenizer.control, tokenizer.eos_id}:
        say(
            f"answers in the layout of {template.name} do not end with a control token of {tokenizer.path}; "
            "what is tuned on them may not learn where to stop"
        )
    return template


def _own_layout(tokenizer: Tokenizer, dialog: list[Message]) -> Encoded | None:
    """A dialog as the tokenizer's model ships it; None where it ships no layout, or none for it."""
    try:
        return chat_template(tokenizer.path.parent).encode(tokenizer, dialog)
    except PunaError:
        return None


def _unit(number: int, spans: list[Span]) -> Unit:
    listed = "\n".join(f"{span.source}\n{span.id}\n{span.start}\n{span.checksum}" for span in spans)
    return Unit(number, spans, xxhash.xxh3_128_hexdigest(listed.encode()))


def _holds(array: np.ndarray, key: np.uint64) -> bool:
    place = int(np.searchsorted(array, key))
    return place < len(array) and array[place] == key
