"""`puna prepare`: from sources to a prepared folder, in parallel, in constant memory, and never twice.

    look     the sources are read once, in a fixed order, and cut into units     unfinished/plan.jsonl
    work     each unit becomes a shard and a report, in whichever process is free     shard-*, unfinished/unit-*
    finish   the reports become dataset.json and left_out.jsonl, and `unfinished/` goes

Whoever is killed and started again looks once more, finds the reports of finished units and goes on with the others.
What the shards hold depends on the sources and options alone: not on the number of processes, nor on interruptions.
"""

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import compress, count
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import puna
from puna.data import corpora
from puna.data.documents import LeftOut, Span, checksum, is_spellable
from puna.data.plan import Seen, cut_into_units
from puna.data.shards import DATASET_FILE, FORMAT, WORK_FOLDER, Dataset
from puna.data.units import PARTS, PrepareUnit, SketchUnit, Unit, report_path
from puna.data.workers import Workers, can_be_copied
from puna.devices import cpu_cores
from puna.errors import PunaError, UsageError
from puna.files import ASIDE, file_aside, read_json, try_lock, write_json
from puna.garbage import seldom_collected
from puna.progress import Progress, say
from puna.prompts import ChatTemplate, Encoded, Message, chat_template, infill_document
from puna.prompts.templates import with_specials_of
from puna.tokenizer import Tokenizer, load_tokenizer
from puna.tokenizer.base import TEMPLATE_FILE

#: So many units, of two megabytes each, this process has worked off in about the time in which fresh ones start.
UNITS_WORTH_PROCESSES = 6

#: Of a model, beside its tokenizer.
CONFIG_FILE = "config.json"

#: Where what was left out is listed, one JSON object a line.
LEFT_OUT_FILE = "left_out.jsonl"


def prepare(
    kind: str,
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str],
    workers: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Makes a prepared folder of documents as token ids; started again after it was stopped, it continues.

    Args:
        kind: of the sources, a name from `puna.data.corpora`: "chat", "code", "jsonl", "mindrecord", "text",
            "wikitext".
        sources: files or folders.
        output: the folder to make.
        tokenizer: file or folder.
        workers: processes; if not given as many as there are processors, for little data none but this one. The result
            does not depend on it.
        options: those of the kind, e.g. `fim_rate=0.9`, `held_out=0.01`, `near_duplicates=True`, `template="vicuna"`;
            `puna prepare KIND --help` lists them.

    Returns:
        What `dataset.json` says.

    Raises:
        UsageError: no such kind or option.
        PunaError: a source or the tokenizer is missing; there is nothing in the sources; `output` holds something else.
    """
    job = _Job(kind, sources, Path(output), _tokenizer_of(Path(tokenizer)), options)
    count = workers if workers is not None else cpu_cores()
    if count < 1:
        raise UsageError(f"workers must be at least 1, not {count}")
    if (job.output / DATASET_FILE).exists():
        return _as_it_is(job)
    began = time.monotonic()
    _claim(job)
    with _alone(job):
        job.save_tokenizer(job.output / "tokenizer")
        try:
            _work(job, count, worth_starting=1 if workers or can_be_copied() else UNITS_WORTH_PROCESSES)
            info = _finish(job)
        finally:
            _sweep(job.output)
    seconds = time.monotonic() - began
    tokens, read = info["tokens"], sum(source["bytes"] for source in info["sources"].values())
    say(
        f"prepared {info['documents']:,} documents, {tokens:,} tokens in {seconds:.1f} s "
        f"({read / 1e6 / seconds:.2f} MB/s, {tokens / seconds:,.0f} tokens/s){_left_out_line(info, job.output)}"
    )
    return info


def _tokenizer_of(path: Path) -> Tokenizer:
    """Opens a tokenizer; one in a model's folder without control pieces that the model has no embeddings for."""
    tokenizer = load_tokenizer(path)
    config = tokenizer.path.with_name(CONFIG_FILE)
    size = read_json(config).get("vocab_size") if config.is_file() else None
    if isinstance(size, int):
        tokenizer.check_vocab_size(size)
    return tokenizer


@seldom_collected()
def _work(job: "_Job", count: int, *, worth_starting: int) -> None:
    """Looks at the sources and makes the shards that are not there yet; little is done in this process alone."""
    with Workers(PrepareUnit(job.kind, job.options, job.tokenizer, job.output), count) as pool:
        try:
            size_bytes, units = job.look(start_processes=pool.start, worth_starting=worth_starting)
        except PunaError:  # of a source or an option, which whoever mends it gives anew
            if not any(job.work.glob("unit-*")):
                shutil.rmtree(job.output)
            raise
        if units <= worth_starting:
            pool.count = 1
        if job.options.get("near_duplicates"):
            job.find_near_duplicates(count, size_bytes)
        with Progress("preparing", size_bytes / 1e6, "MB") as progress:
            for unit in pool.map(_unfinished(job, progress)):
                progress.advance(unit.size_bytes / 1e6)


class _Job:
    """What is to be prepared, and what looking at it has found."""

    def __init__(self, kind: str, sources: Any, output: Path, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
        self.kind, self.output, self.tokenizer = kind, output, tokenizer
        self.options = corpora.checked_options(kind, options)
        paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
        if not paths:
            raise UsageError("name at least one source")
        self.paths = [Path(path).resolve() for path in paths]
        for path in self.paths:
            if not path.exists():
                raise PunaError(f"{path} does not exist")
            if not is_spellable(str(path)):
                raise PunaError(f"{str(path)!r} cannot be spelled in UTF-8, as dataset.json would; rename it")
        #: What files decide that stand beside those that are named, and may be edited.
        self.beside: dict[str, Any] = {}
        if tokenizer.path.suffix == ".json":
            self.beside |= {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        name = self.options.get("template")
        self.template = None if name is None else _checked_layout(name, tokenizer)
        if self.template is not None and self.template.digest:
            self.beside |= {"template_digest": self.template.digest}
        if self.options.get("fim_rate"):
            infill_document(tokenizer, "", "", "", order="psm")
        self.sources: dict[str, dict[str, Any]] = {}
        self.copies: dict[int, dict[int, str]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on, apart from what the sources hold."""
        return {
            "kind": self.kind,
            "sources": [str(path) for path in self.paths],
            "tokenizer": self.tokenizer.sha256,
            "options": self.options,
            **self.beside,
        }

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer's files; dialogs bring the layout along that they were made with, if it can be said."""
        self.tokenizer.save(folder)
        if self.tokenizer.path.suffix == ".json" and self.tokenizer.path.with_name(CONFIG_FILE).is_file():
            # It may be the only one that tells, and the model's stays behind.
            ids = {"bos_token_id": self.tokenizer.bos_id, "eos_token_id": self.tokenizer.eos_id}
            write_json(folder / CONFIG_FILE, ids)
        if self.template is not None and self.template.jinja is not None:
            with file_aside(folder / TEMPLATE_FILE, "w") as file:
                file.write(self.template.jinja)

    @property
    def work(self) -> Path:
        """The folder that is there until all is done."""
        return self.output / WORK_FOLDER

    def look(self, *, start_processes: Callable[[], None], worth_starting: int) -> tuple[int, int]:
        """Cuts the sources into units, written to plan.jsonl; starts processes once there are more than so many.

        Returns:
            How many bytes there are to read, and how many units.
        """
        total = count = 0
        self.sources = {}
        with (
            file_aside(self.work / "plan.jsonl", "w", sync=False) as plan,
            file_aside(self.work / LEFT_OUT_FILE, "w", sync=False) as left_out,
            Progress("looking at the sources", unit="MB") as progress,
        ):
            for unit in cut_into_units(self._spans(left_out)):
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
        """Finds the documents that are left out because they nearly are copies of others."""
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

    def _spans(self, left_out: Any) -> Iterator[Span]:
        """The spans of all sources; what is left out goes to the file."""
        corpus = corpora.find(self.kind)
        seen = Seen()
        for path in self.paths:
            digest, files, size = xxhash.xxh3_128(), 0, 0
            for span in corpus.spans(path, self.options):
                if isinstance(span, Span):
                    digest.update(f"{span.id}\n{span.start}\n{span.checksum}\n".encode())
                    files, size = files + (span.start == 0), size + span.stop - span.start
                    place = f"{span.path}\n{span.start}"  # sources may overlap, and one shard may bring all along
                    if seen.is_new(int(span.checksum if corpus.DISTINCT else checksum(os.fsencode(place)), 16)):
                        yield span
                        continue
                    reason = "exact duplicate" if corpus.DISTINCT else "named twice"
                    span = LeftOut(span.id, span.source, reason)
                left_out.write(json.dumps(asdict(span), ensure_ascii=False) + "\n")
            self.sources[str(path)] = {"files": files, "bytes": size, "xxh3_128": digest.hexdigest()}


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
            f"the layout of {template.name} writes begin or end otherwise than the files of {tokenizer.path}, "
            "with which a tuned model ships it; give the tokenizer of the layout's folder"
        )
    if not template.digest and _own_layout(tokenizer, dialog) not in (None, encoded):
        say(
            f"{tokenizer.path.parent} ships another layout of dialogs than {name}; --template {tokenizer.path.parent} "
            "takes it"
        )
    if encoded.tokens[max(compress(count(), encoded.is_target))] not in {*tokenizer.control, tokenizer.eos_id}:
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


def _claim(job: _Job) -> None:
    """Makes the folder this job's, or makes sure that it is.

    Raises:
        PunaError: it holds something else, or the same with other settings.
    """
    settings_file = job.work / "settings.json"
    if settings_file.exists():
        _check_same(job, read_json(settings_file), "is being made")
        return
    if job.output.exists() and (not job.output.is_dir() or any(map(_is_something, job.output.rglob("*")))):
        raise PunaError(f"{job.output} exists already and is not a prepared folder; choose another place")
    write_json(settings_file, job.settings)


def _is_something(path: Path) -> bool:
    """Not so folders, nor what a process that was killed had half written."""
    return path.suffix != ASIDE and not path.is_dir()


@contextlib.contextmanager
def _alone(job: _Job) -> Iterator[None]:
    """Keeps other processes from preparing the same folder meanwhile; ends with this process, however that ends."""
    with open(job.work / "lock", "wb") as lock:
        if try_lock(lock) is False:
            raise PunaError(f"{job.output} is being prepared by another process; wait for it, or stop it")
        yield


def _check_same(job: _Job, found: dict[str, Any], how: str) -> None:
    asked = _flat(job.settings)
    found = _flat(found)
    for name in sorted(asked.keys() | found.keys()):
        if asked.get(name) != found.get(name):
            raise PunaError(
                f"{job.output} {how} with {name} {found.get(name)!r}, not {asked.get(name)!r}; "
                "choose another place, or remove it first"
            )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, **settings["options"], "options": sorted(settings["options"])}


def _as_it_is(job: _Job) -> dict[str, Any]:
    """The finished folder, if what is asked for would give the same."""
    info = read_json(job.output / DATASET_FILE)
    _check_same(job, info["settings"], "was made")
    shutil.rmtree(job.work, ignore_errors=True)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for _ in job._spans(nowhere):
            pass
    changed = [path for path, source in job.sources.items() if source != info["sources"].get(path)]
    if changed:
        raise PunaError(f"{job.output} exists already, and {changed[0]} has changed since; choose another place")
    _check_whole(job.output, info)
    say(f"{job.output} is prepared already, from the same sources with the same settings")
    return info


def _check_whole(output: Path, info: dict[str, Any]) -> None:
    for part in ("train", "held_out") if "held_out" in info else ("train",):
        try:
            Dataset.open(output / PARTS[part]).verify()
        except PunaError as error:
            raise PunaError(f"{error}; remove {output} first") from None


def _unfinished(job: _Job, progress: Progress) -> Iterator[Unit]:
    """The units that have no report yet; the others count as progress."""
    for unit in job.units():
        report = report_path(job.output, unit.number)
        if not report.exists():
            yield unit
        elif read_json(report)["digest"] == unit.digest:
            progress.advance(unit.size_bytes / 1e6)
        else:
            raise PunaError(f"the sources changed since {job.output} was begun; remove it and start again")


def _finish(job: _Job) -> dict[str, Any]:
    """Puts the reports together, and makes the folder a prepared one."""
    shards: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    sizes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    languages: dict[str, dict[str, int]] = {}
    with file_aside(job.output / LEFT_OUT_FILE, "w") as listing:
        with open(job.work / LEFT_OUT_FILE, encoding="utf-8") as left_out:
            for line in left_out:
                reasons[json.loads(line)["reason"]] += 1
                listing.write(line)
        for unit in job.units():
            report = read_json(report_path(job.output, unit.number))
            for part, entry in report["shards"].items():
                shards[part].append(entry)
            sizes.update(report["bytes"])
            for language, (documents, size) in report["languages"].items():
                total = languages.setdefault(language, {"documents": 0, "bytes": 0})
                total["documents"] += documents
                total["bytes"] += size
            for refused in report["left_out"]:
                reasons[refused["reason"]] += 1
                listing.write(json.dumps(refused, ensure_ascii=False) + "\n")
    if not shards["train"]:
        shutil.rmtree(job.output)  # it was empty or not there before
        if shards["held_out"]:
            raise PunaError("every document would be held out, and none is left; take a smaller --held-out")
        raise PunaError(f"there is nothing to prepare in {', '.join(map(str, job.paths))}{_reasons_line(reasons)}")
    info = {part: _info(job, shards[part], sizes[part]) for part in PARTS if shards[part]}
    info["train"] |= {"left_out": dict(sorted(reasons.items())), "languages": dict(sorted(languages.items()))}
    if "held_out" in info:
        info["held_out"]["fill"] = "whole-documents" if _has_dialogs(job, info["held_out"]) else "end-to-end"
        job.save_tokenizer(job.output / PARTS["held_out"] / "tokenizer")
        write_json(job.output / PARTS["held_out"] / DATASET_FILE, info["held_out"])
        info["train"]["held_out"] = {name: info["held_out"][name] for name in ("documents", "tokens", "bytes")}
    write_json(job.output / DATASET_FILE, info["train"])
    shutil.rmtree(job.work)
    return info["train"]


def _info(job: _Job, shards: list[dict[str, Any]], size_bytes: int) -> dict[str, Any]:
    totals = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "targets")}
    is_whole = _has_dialogs(job, totals) or bool(job.options.get("fim_rate"))
    return {
        "format": FORMAT,
        "made_by": f"puna {puna.__version__}",
        "kind": job.kind,
        "fill": "whole-documents" if is_whole else "end-to-end",
        "tokenizer": {"sha256": job.tokenizer.sha256, "vocab_size": job.tokenizer.vocab_size},
        **totals,
        "bytes": size_bytes,
        "left_out": {},
        "sources": job.sources,
        "settings": job.settings,
        "shards": shards,
    }


def _has_dialogs(job: _Job, totals: dict[str, Any]) -> bool:
    """Whether documents are questions and answers: made with a template, or with tokens that are not learnt."""
    is_made_so = "template" in job.options or bool(job.options.get("faithful"))
    return is_made_so or totals["targets"] < totals["tokens"]


def _left_out_line(info: dict[str, Any], output: Path) -> str:
    return f"{_reasons_line(Counter(info['left_out']))}; see {output / LEFT_OUT_FILE}" if info["left_out"] else ""


def _reasons_line(reasons: Counter[str]) -> str:
    if not reasons:
        return ": it is empty"
    return "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def _sweep(output: Path) -> None:
    """Removes what processes that were killed had half written."""
    with contextlib.suppress(OSError):
        for path in output.rglob(f"*{ASIDE}"):
            path.unlink()
