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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import puna
from puna.data.job import LEFT_OUT_FILE, Job
from puna.data.shards import DATASET_FILE, FORMAT, Dataset
from puna.data.units import PARTS, PrepareUnit, Unit, report_path
from puna.data.workers import Workers, can_be_copied
from puna.devices import cpu_cores
from puna.errors import PunaError, UsageError
from puna.files import ASIDE, file_aside, read_json, try_lock, write_json
from puna.garbage import seldom_collected
from puna.progress import Progress, say

#: In the folder of work: what is being made there, and who is at it.
SETTINGS_FILE, LOCK_FILE = "settings.json", "lock"

#: Units of two megabytes that this process finishes in about the time that fresh processes take to start.
UNITS_WORTH_PROCESSES = 6


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
    job = Job(kind, sources, Path(output), Path(tokenizer), options)
    count = workers if workers is not None else cpu_cores()
    if count < 1:
        raise UsageError(f"workers must be at least 1, not {count}")
    if (job.output / DATASET_FILE).exists():
        return _as_it_is(job)
    began = time.monotonic()
    _check_place(job)
    with _alone(job):
        if (job.output / DATASET_FILE).exists():  # another process has finished it meanwhile
            return _as_it_is(job)
        _claim(job)
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
        f"({read / 1e6 / seconds:.2f} MB/s, {tokens / seconds:,.0f} tokens/s)"
        f"{_held_out_line(info)}{_left_out_line(info, job.output)}"
    )
    return info


def changed_source(folder: Path) -> str | None:
    """The first source of a prepared folder of which something else is read now than when it was made, if any is."""
    info = read_json(folder / DATASET_FILE)
    settings = info["settings"]
    job = Job(settings["kind"], settings["sources"], folder, folder / "tokenizer", settings["options"])
    return _changed(job, info)


@seldom_collected()
def _work(job: Job, count: int, *, worth_starting: int) -> None:
    """Looks at the sources and makes the shards that are not there yet; few units are left to this process alone."""
    with Workers(PrepareUnit(job.kind, job.options, job.tokenizer, job.output), count) as pool:
        try:
            size_bytes, units = job.look(start_processes=pool.start, worth_starting=worth_starting)
        except PunaError:  # of a source or an option, which whoever mends it gives anew
            if not any(job.work.glob("unit-*")):
                job.withdraw()
            raise
        if units <= worth_starting:
            pool.count = 1
        if job.options.get("near_duplicates"):
            job.find_near_duplicates(count, size_bytes)
        with Progress("preparing", size_bytes / 1e6, "MB") as progress:
            for unit in pool.map(_unfinished(job, progress)):
                progress.advance(unit.size_bytes / 1e6)


def _check_place(job: Job) -> None:
    """Refuses a folder that holds something else, before anything is made there."""
    if job.output.exists() and not (job.work / SETTINGS_FILE).exists():
        lock = job.work / LOCK_FILE  # of a process that was killed before it wrote more
        if not job.output.is_dir() or any(_is_something(path) for path in job.output.rglob("*") if path != lock):
            raise PunaError(f"{job.output} exists already and is not a prepared folder; choose another place")


def _is_something(path: Path) -> bool:
    """Whether this is neither a folder nor a file that a killed process left half written."""
    return path.suffix != ASIDE and not path.is_dir()


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Keeps other processes from preparing the same folder meanwhile, until this process ends in whatever way."""
    job.work.mkdir(parents=True, exist_ok=True)
    with open(job.work / LOCK_FILE, "wb") as lock:
        if try_lock(lock) is False:
            raise PunaError(f"{job.output} is being prepared by another process; wait for it, or stop it")
        yield


def _claim(job: Job) -> None:
    """Makes the folder this job's; a PunaError where it was begun with other settings. Only for who is alone."""
    settings_file = job.work / SETTINGS_FILE
    if settings_file.exists():
        _check_same(job, read_json(settings_file), "is being made")
    else:
        write_json(settings_file, job.settings)


def _check_same(job: Job, found: dict[str, Any], how: str) -> None:
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


def _as_it_is(job: Job) -> dict[str, Any]:
    """The finished folder, if what is asked for would give the same."""
    info = read_json(job.output / DATASET_FILE)
    _check_same(job, info["settings"], "was made")
    shutil.rmtree(job.work, ignore_errors=True)
    if changed := _changed(job, info):
        raise PunaError(
            f"{job.output} exists already, and what is read of {changed} has changed since; choose another place"
        )
    _check_whole(job.output, info)
    say(f"{job.output} is prepared already, from the same sources with the same settings")
    return info


def _changed(job: Job, info: dict[str, Any]) -> str | None:
    for _ in job.spans():
        pass
    return next((path for path, source in job.sources.items() if source != info["sources"].get(path)), None)


def _check_whole(output: Path, info: dict[str, Any]) -> None:
    for part in ("train", "held_out") if "held_out" in info else ("train",):
        try:
            Dataset.open(output / PARTS[part]).verify()
        except PunaError as error:
            raise PunaError(f"{error}; remove {output} first") from None


def _unfinished(job: Job, progress: Progress) -> Iterator[Unit]:
    """The units that have no report yet; the others count as progress."""
    for unit in job.units():
        report = report_path(job.output, unit.number)
        if not report.exists():
            yield unit
        elif read_json(report)["digest"] == unit.digest:
            progress.advance(unit.size_bytes / 1e6)
        else:
            raise PunaError(f"the sources changed since {job.output} was begun; remove it and start again")


def _finish(job: Job) -> dict[str, Any]:
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


def _info(job: Job, shards: list[dict[str, Any]], size_bytes: int) -> dict[str, Any]:
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


def _has_dialogs(job: Job, totals: dict[str, Any]) -> bool:
    """Whether documents are questions and answers: made with a template, or with tokens that are not learnt."""
    is_made_so = "template" in job.options or bool(job.options.get("faithful"))
    return is_made_so or totals["targets"] < totals["tokens"]


def _held_out_line(info: dict[str, Any]) -> str:
    if not info["settings"]["options"].get("held_out"):
        return ""
    kept = info.get("held_out", {}).get("documents", 0)
    advice = "" if kept else ": give a larger --held-out"
    return f"; {kept:,} of {kept + info['documents']:,} documents held out{advice}"


def _left_out_line(info: dict[str, Any], output: Path) -> str:
    return f"{_reasons_line(Counter(info['left_out']))}; see {output / LEFT_OUT_FILE}" if info["left_out"] else ""


def _reasons_line(reasons: Counter[str]) -> str:
    if not reasons:
        return ": it is empty"
    return "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def _sweep(output: Path) -> None:
    """Removes files that killed processes left half written."""
    with contextlib.suppress(OSError):
        for path in output.rglob(f"*{ASIDE}"):
            path.unlink()
