import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from puna.cli import run
from puna.data import job, shards
from puna.data import prepare as preparing
from puna.data.corpora import wikitext
from puna.data.documents import Document
from puna.data.prepare import prepare
from puna.data.shards import Dataset
from puna.data.units import is_held_out
from puna.errors import PunaError, UsageError
from puna.files import read_json
from puna.prompts import chat_template, infill_document
from puna.tokenizer import load_tokenizer

#: Bytes of a unit in tests, so that a few files make several.
UNIT_BYTES = 40_000


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(job, "SMALLEST_UNIT", UNIT_BYTES)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Code that people wrote: two packages of the standard library, half a megabyte."""
    folder = tmp_path_factory.mktemp("library")
    for package in ("email", "json", "importlib"):
        source, ignored = Path(os.__file__).parent / package, shutil.ignore_patterns("__pycache__", "*.rst")
        shutil.copytree(source, folder / package, ignore=ignored)
    return folder


@pytest.fixture
def make(small_tokenizer):
    """Prepares with the small tokenizer, in this process unless told otherwise."""

    def make(kind, sources, output, **options):
        return prepare(kind, sources, output, tokenizer=small_tokenizer.path, **{"workers": 1, **options})

    return make


def test_a_share_that_leaves_nothing_to_learn_from_is_said(make, library, tmp_path):
    with pytest.raises(PunaError, match=r"every document would be held out, .* take a smaller --held-out"):
        make("code", [library], tmp_path / "out", held_out=1.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("share", "advice"), [(0.4, ""), (1e-9, ": give a larger --held-out")])
def test_how_many_documents_were_held_out_is_said(make, library, tmp_path, capsys, share, advice):
    info = make("code", library / "json", tmp_path / "out", held_out=share)
    kept = len(list((library / "json").iterdir())) - info["documents"]
    assert (kept == 0) == bool(advice)
    assert f"; {kept} of {kept + info['documents']} documents held out{advice}\n" in capsys.readouterr().err
    make("code", library / "json", tmp_path / "whole")
    assert "held out" not in capsys.readouterr().err


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def documents_of(folder: Path) -> dict[str, list[int]]:
    dataset = Dataset.open(folder)
    return {id: tokens.tolist() for id, _, tokens in map(dataset.document, range(len(dataset)))}


def left_out(folder: Path) -> dict[str, str]:
    lines = (folder / "left_out.jsonl").read_text().splitlines()
    return {record["id"]: record["reason"] for record in map(json.loads, lines)}


# --- what is in a prepared folder


def test_documents_are_the_files_between_begin_and_end(library, make, small_tokenizer, tmp_path):
    info = make("code", library, tmp_path / "out")
    found = documents_of(tmp_path / "out")
    files = {str(file.relative_to(library)): file.read_text() for file in library.rglob("*.py") if file.stat().st_size}
    assert len(info["shards"]) > 5
    assert found.keys() | left_out(tmp_path / "out").keys() >= files.keys()
    assert len(found) > 30
    for id, tokens in found.items():
        assert tokens == small_tokenizer.encode(files[id], bos=True, eos=True)


def test_dataset_json_says_what_is_there(library, make, small_tokenizer, tmp_path):
    info = make("code", [library / "json", library / "email"], tmp_path / "out", held_out=0.2)
    dataset = Dataset.open(tmp_path / "out")
    dataset.verify()
    assert info == dataset.info
    assert info["documents"] == len(dataset) == info["languages"]["python"]["documents"]
    assert info["tokens"] == info["targets"] == dataset.starts[-1]
    assert info["tokenizer"] == {"sha256": small_tokenizer.sha256, "vocab_size": 1024}
    assert load_tokenizer(tmp_path / "out/tokenizer").sha256 == small_tokenizer.sha256
    assert info["fill"] == "end-to-end"
    assert [Path(source).name for source in info["sources"]] == ["json", "email"]
    assert sum(info["left_out"].values()) == len((tmp_path / "out/left_out.jsonl").read_text().splitlines())
    assert {dataset.document(i)[1] for i in range(len(dataset))} == {"json", "email"}
    decoded = (small_tokenizer.decode(dataset.document(i)[2].tolist()) for i in range(len(dataset)))
    assert info["bytes"] == sum(len(text.encode()) for text in decoded)
    assert not (tmp_path / "out/unfinished").exists()


def test_a_source_is_known_by_a_hash_of_what_it_holds(library, make, tmp_path):
    one = make("code", library / "json", tmp_path / "one")
    copy = shutil.copytree(library / "json", tmp_path / "json")
    (source,) = make("code", copy, tmp_path / "two")["sources"].values()
    assert [source] == list(one["sources"].values())
    (copy / "decoder.py").write_text("x = 1\n")
    (changed,) = make("code", copy, tmp_path / "three")["sources"].values()
    assert changed["xxh3_128"] != source["xxh3_128"]


def test_only_the_first_of_equal_files_stays(make, tmp_path):
    for name in ("b.py", "a/x.py", "c.py"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text("same = 1\n" if name != "c.py" else "other = 1\n")
    assert make("code", tmp_path / "src", tmp_path / "out")["left_out"] == {"exact duplicate": 1}
    assert set(documents_of(tmp_path / "out")) == {"a/x.py", "c.py"}
    assert left_out(tmp_path / "out") == {"b.py": "exact duplicate"}


def test_what_two_sources_hold_is_taken_once(make, tmp_path):
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text("the same text")
    sources = [tmp_path / "src/sub", tmp_path / "src", tmp_path / "src/a.txt"]
    assert make("text", sources, tmp_path / "out")["left_out"] == {"named twice": 2}
    assert list(documents_of(tmp_path / "out")) == ["b.txt", "a.txt"]  # two files, though they say the same
    (tmp_path / "src" / os.fsdecode(b"caf\xe9.txt")).write_text("a text")
    assert make("text", tmp_path / "src", tmp_path / "odd")["documents"] == 3


def test_a_set_of_hashes_remembers_each_of_them():
    draw = random.Random(0)
    values = [draw.getrandbits(64) for _ in range(150_000)]
    seen, plain = job.Seen(), set[int]()
    for value in values + values[::3] + [draw.getrandbits(64) for _ in range(1000)]:
        assert seen.is_new(value) == (value not in plain)
        plain.add(value)


# --- held-out documents


def test_held_out_documents_are_a_prepared_folder_of_their_own(library, make, small_tokenizer, tmp_path):
    info = make("code", library, tmp_path / "out", held_out=0.3, fim_rate=1.0)
    everything = documents_of(make_whole(make, library, tmp_path / "whole"))
    train, held_out = documents_of(tmp_path / "out"), documents_of(tmp_path / "out/held_out")
    assert train.keys() | held_out.keys() == everything.keys()
    assert not train.keys() & held_out.keys()
    assert len(held_out) > 5
    assert held_out == {id: everything[id] for id in held_out}  # whole, never cut for infilling
    assert info["held_out"]["documents"] == len(held_out)
    assert Dataset.open(tmp_path / "out/held_out").info["fill"] == "end-to-end"
    assert load_tokenizer(tmp_path / "out/held_out/tokenizer").sha256 == small_tokenizer.sha256


def make_whole(make, source: Path, output: Path) -> Path:
    make("code", source, output)
    return output


def test_new_files_move_none_into_or_out_of_the_held_out_part(library, make, tmp_path):
    source = shutil.copytree(library, tmp_path / "src")
    make("code", source, tmp_path / "before", held_out=0.3)
    for i in range(30):
        (source / f"json/new_{i}.py").write_text(f"x = {i}\n")
    make("code", source, tmp_path / "after", held_out=0.3)
    before, after = (set(documents_of(tmp_path / name / "held_out")) for name in ("before", "after"))
    assert before == {id for id in after if "new_" not in id}
    assert before < after


COPIES = {
    "text": {f"{i}.txt": f"text {i % 40}" for i in range(120)},
    "jsonl": {"a.jsonl": "".join(json.dumps({"text": f"text {i % 40}"}) + "\n" for i in range(120))},
    "chat": {"a.json": json.dumps([{"instruction": f"question {i % 40}", "output": "answer"} for i in range(120)])},
}


@pytest.mark.parametrize("kind", COPIES)
def test_no_copy_of_a_held_out_document_is_trained_on(make, tmp_path, kind):
    (tmp_path / "src").mkdir()
    for name, content in COPIES[kind].items():
        (tmp_path / "src" / name).write_text(content)
    make(kind, tmp_path / "src", tmp_path / "out", held_out=0.3)
    train, held_out = ([*documents_of(place).values()] for place in (tmp_path / "out", tmp_path / "out/held_out"))
    assert len(train) + len(held_out) == 120
    assert len({*map(tuple, held_out)}) > 5
    assert not {*map(tuple, train)} & {*map(tuple, held_out)}


def test_no_near_copy_of_a_held_out_file_is_trained_on(library, make, tmp_path):
    pytest.importorskip("datasketch")
    source = tmp_path / "src"
    for file in (library / "email").glob("*.py"):
        for i in range(2):
            (source / str(i)).mkdir(parents=True, exist_ok=True)
            (source / str(i) / file.name).write_text(f"# copy {i}\n{file.read_text()}")
    make("code", source, tmp_path / "leaky", held_out=0.3)
    held_out, train = (names(tmp_path / place) for place in ("leaky/held_out", "leaky"))
    assert held_out & train
    options = {"held_out": 0.3, "near_duplicates": True}
    info = make("code", source, tmp_path / "one", **options)
    held_out, train = (names(tmp_path / place) for place in ("one/held_out", "one"))
    assert not held_out & train
    assert held_out | train == {file.name for file in source.rglob("*.py")}
    assert info["left_out"] == {"near-duplicate": info["documents"] + info["held_out"]["documents"]}
    make("code", source, tmp_path / "two", workers=2, **options)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")


def names(folder: Path) -> set[str]:
    return {Path(id).name for id in documents_of(folder)}


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in bytes_of(folder).items() if name.endswith((".arrow", ".jsonl"))}


# --- infilling


def test_infilling_documents_are_laid_out_as_prompts_spells_them(library, make, small_tokenizer, tmp_path, monkeypatch):
    from puna.data import units

    cuts = {}
    real = units.cut_for_infilling

    def cut(text, *, id, **settings):
        cuts[id] = text, real(text, id=id, **settings)
        return cuts[id][1]

    monkeypatch.setattr(units, "cut_for_infilling", cut)
    info = make("code", library, tmp_path / "out", fim_rate=0.5, seed=3, fim_tokens=5000)
    found = documents_of(tmp_path / "out")
    assert info["fill"] == "whole-documents"
    assert len(cuts) == len(found) > 30
    assert {"psm", "spm", None} == {cut and cut.order for _, cut in cuts.values()}
    longest, n_too_long = 0, 0
    for id, (text, cut) in cuts.items():
        laid_out = small_tokenizer.encode(text, bos=True, eos=True)
        if cut is not None:
            with_gap = infill_document(small_tokenizer, cut.prefix, cut.middle, cut.suffix, order=cut.order)
            if len(with_gap) <= 5000:  # a row holds it whole
                laid_out, longest = with_gap, max(longest, len(with_gap))
            else:
                n_too_long += 1
        assert found[id] == laid_out
    assert longest > 2500
    assert n_too_long > 3


def test_cuts_do_not_depend_on_what_else_is_there(library, make, tmp_path):
    make("code", library, tmp_path / "all", fim_rate=0.9)
    make("code", library / "email", tmp_path / "some", fim_rate=0.9)
    everything, some = documents_of(tmp_path / "all"), documents_of(tmp_path / "some")
    assert len(some) > 10
    # The id of a file is its place within its source, so only cuts of files with the same id are the same.
    source = shutil.copytree(library / "email", tmp_path / "again")
    (source / "new.py").write_text("x = 1\n")
    make("code", source, tmp_path / "more", fim_rate=0.9)
    more = documents_of(tmp_path / "more")
    assert {id: tokens for id, tokens in more.items() if id != "new.py"} == some
    assert len(everything) > len(some)


def test_a_vocabulary_without_markers_cannot_infill(library, shared, tmp_path):
    with pytest.raises(PunaError, match="no infilling markers"):
        prepare("code", library, tmp_path / "out", tokenizer=shared / "data/tokenizer", fim_rate=0.9)
    assert not (tmp_path / "out").exists()


# --- the same bytes, whoever works and whatever happens


@pytest.fixture(scope="module")
def undisturbed(library, small_tokenizer, tmp_path_factory) -> dict[str, bytes]:
    """All files of a folder that one process made in one go."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "SMALLEST_UNIT", UNIT_BYTES)
        prepare("code", library, output, tokenizer=small_tokenizer.path, workers=1, **OPTIONS)
    assert len(list(output.glob("shard-*"))) > 5
    return bytes_of(output)


OPTIONS = {"fim_rate": 0.9, "held_out": 0.2}


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(library, make, tmp_path, undisturbed, workers):
    make("code", library, tmp_path / "out", workers=workers, **OPTIONS)
    assert bytes_of(tmp_path / "out") == undisturbed


def command(library: Path, output: Path, tokenizer: Path, workers: int) -> list[str]:
    """`puna prepare` with small units; that it is not done before a test stops it, a pause lies behind the third."""
    program = f"""
import sys, time
from puna.cli import run
from puna.data import job, prepare
job.SMALLEST_UNIT = {UNIT_BYTES}
real = prepare._unfinished
def slowly(*arguments):
    for number, unit in enumerate(real(*arguments)):
        yield unit
        time.sleep(60 if number == 2 else 0.1)
prepare._unfinished = slowly
sys.exit(run(sys.argv[1:]))
"""
    arguments = ["prepare", "code", library, "-o", output, "--tokenizer", tokenizer, "--workers", workers]
    rates = ["--fim-rate", 0.9, "--held-out", 0.2]
    return [sys.executable, "-c", program, *map(str, [*arguments, *rates])]


def start_and_wait_for_reports(arguments: list[str], output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(output.glob("unfinished/unit-*.json"))) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again_it_continues_to_the_same_bytes(
    library, make, small_tokenizer, tmp_path, undisturbed, workers
):
    output = tmp_path / "out"
    process = start_and_wait_for_reports(command(library, output, small_tokenizer.path, workers), output)
    process.kill()
    process.wait()
    process.stderr.close()
    with pytest.raises(PunaError, match="is not finished"):
        Dataset.open(output)
    finished = [read_json(report)["shards"].values() for report in output.glob("unfinished/unit-*.json")]
    kept = [output / shard["file"] for shards in finished for shard in shards if (output / shard["file"]).exists()]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert before
    make("code", library, output, **OPTIONS)
    assert bytes_of(output) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_ctrl_c_says_one_thing_and_leaves_nothing_half_done(library, make, small_tokenizer, tmp_path, undisturbed):
    output = tmp_path / "out"
    process = start_and_wait_for_reports(command(library, output, small_tokenizer.path, 2), output)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert [line for line in said.splitlines() if not line.startswith(("looking", "preparing"))] == [
        "puna: interrupted; what was finished is kept"
    ]
    assert not list(output.rglob("*.aside"))
    assert not (output / "dataset.json").exists()
    make("code", library, output, **OPTIONS)
    assert bytes_of(output) == undisturbed


def test_worker_processes_end_with_the_one_that_started_them(library, small_tokenizer, tmp_path):
    output = tmp_path / "out"
    process = start_and_wait_for_reports(command(library, output, small_tokenizer.path, 2), output)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.wait()
    process.stderr.close()
    deadline = time.monotonic() + 10
    while any(is_running(int(child)) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_after_a_full_disk_it_continues(library, make, tmp_path, undisturbed, monkeypatch):
    real, written = shards.ShardWriter.finish, []

    def finish(writer):
        written.append(writer)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(writer)

    monkeypatch.setattr(shards.ShardWriter, "finish", finish)
    with pytest.raises(OSError, match="No space left"):
        make("code", library, tmp_path / "out", **OPTIONS)
    assert not list(tmp_path.rglob("*.aside"))
    make("code", library, tmp_path / "out", **OPTIONS)
    assert bytes_of(tmp_path / "out") == undisturbed


def test_a_full_disk_is_told_in_one_line(library, small_tokenizer, tmp_path, monkeypatch, capsys):
    def finish(writer):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.ShardWriter, "finish", finish)
    arguments = ["prepare", "code", library / "json", "-o", tmp_path / "out", "--tokenizer", small_tokenizer.path]
    assert run(list(map(str, [*arguments, "--workers", 1]))) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("puna: the disk is full (")
    assert last.endswith("run the same command again to continue")


def test_two_do_not_prepare_the_same_folder_at_once(library, make, tmp_path, undisturbed, monkeypatch):
    finish = preparing._finish

    def refusing_a_second(job):
        with pytest.raises(PunaError, match="out is being prepared by another process"):
            make("code", library, tmp_path / "out", **OPTIONS)
        return finish(job)

    monkeypatch.setattr(preparing, "_finish", refusing_a_second)
    make("code", library, tmp_path / "out", **OPTIONS)
    assert bytes_of(tmp_path / "out") == undisturbed


def test_one_that_comes_second_does_not_say_what_is_made(library, make, tmp_path, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "try_lock", lambda _: False)  # the first has just begun, and written nothing yet
        with pytest.raises(PunaError, match="out is being prepared by another process"):
            make("code", library, tmp_path / "out", **{**OPTIONS, "held_out": 0.5})
    make("code", library, tmp_path / "out", **OPTIONS)
    assert bytes_of(tmp_path / "out") == undisturbed


def test_one_that_comes_when_the_first_has_just_finished_does_nothing(library, make, tmp_path, capsys, monkeypatch):
    check = preparing._check_place

    def overtaken(job):
        check(job)
        monkeypatch.setattr(preparing, "_check_place", check)
        make("code", library / "json", tmp_path / "out")

    monkeypatch.setattr(preparing, "_check_place", overtaken)
    info = make("code", library / "json", tmp_path / "out")
    assert info == read_json(tmp_path / "out/dataset.json")
    assert capsys.readouterr().err.count("prepared already") == 1
    assert not (tmp_path / "out/unfinished").exists()


# --- the folder that is there already


def test_a_finished_folder_is_not_made_again(library, make, tmp_path, capsys):
    first = make("code", library / "json", tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    capsys.readouterr()
    assert make("code", library / "json", tmp_path / "out") == first
    assert "is prepared already" in capsys.readouterr().err
    assert bytes_of(tmp_path / "out") == before


@pytest.mark.parametrize("place", ["shard-00000.arrow", "held_out/shard-00000.arrow"])
def test_a_finished_folder_that_is_damaged_is_not_called_prepared(library, make, tmp_path, place):
    make("code", library / "json", tmp_path / "out", held_out=0.4)
    shard = tmp_path / "out" / place
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(PunaError, match=r"is damaged .*; prepare the data again; remove .*out first"):
        make("code", library / "json", tmp_path / "out", held_out=0.4)
    shard.unlink()
    with pytest.raises(PunaError, match=r"is missing .*; remove .*out first"):
        make("code", library / "json", tmp_path / "out", held_out=0.4)


def test_a_finished_folder_of_other_settings_is_not_touched(library, make, tmp_path):
    make("code", library / "json", tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    with pytest.raises(PunaError, match=r"out was made with fim_rate 0.0, not 0.9; choose another place, or remove it"):
        make("code", library / "json", tmp_path / "out", fim_rate=0.9)
    with pytest.raises(PunaError, match="was made with kind 'code', not 'text'"):
        make("text", library / "json", tmp_path / "out")
    assert bytes_of(tmp_path / "out") == before


def test_a_finished_folder_of_sources_that_changed_is_not_touched(library, make, tmp_path):
    source = shutil.copytree(library / "json", tmp_path / "src")
    make("code", source, tmp_path / "out")
    (source / "new.py").write_text("x = 1\n")
    with pytest.raises(
        PunaError, match=r"exists already, and what is read of .*src has changed since; choose another place"
    ):
        make("code", source, tmp_path / "out")


def test_an_unfinished_folder_takes_no_other_settings(library, make, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_finish", lambda job: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make("code", library / "json", tmp_path / "out")
    with pytest.raises(PunaError, match=r"is being made with held_out 0\.0, not 0\.5"):
        make("code", library / "json", tmp_path / "out", held_out=0.5)


def test_sources_that_changed_in_between_are_found_out(library, make, tmp_path, monkeypatch):
    source = shutil.copytree(library / "json", tmp_path / "src")
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_finish", lambda job: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make("code", source, tmp_path / "out")
    (source / "decoder.py").write_text("x = 1\n")
    with pytest.raises(PunaError, match=r"the sources changed since .*out was begun; remove it and start again"):
        make("code", source, tmp_path / "out")


def test_killed_while_it_begins_it_begins_again(library, make, small_tokenizer, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for owner, name in ((type(small_tokenizer), "save"), (preparing, "write_json")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                make("code", library / "json", tmp_path / name)
        (tmp_path / name / "unfinished").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "unfinished/settings.json.1.aside").write_text("{")
        make("code", library / "json", tmp_path / name)
        assert load_tokenizer(tmp_path / name / "tokenizer").sha256 == small_tokenizer.sha256
        assert len(documents_of(tmp_path / name)) > 3


def test_a_layout_in_a_models_folder_that_was_edited_is_another(make, small_tokenizer, tmp_path, monkeypatch):
    layout = tmp_path / "model/chat_template.jinja"
    layout.parent.mkdir()
    layout.write_text("{% for message in messages %}{{ message.content + '</s>' }}{% endfor %}")
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    options = {"template": str(layout.parent)}
    make("chat", tmp_path / "a.jsonl", tmp_path / "finished", **options)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_finish", lambda job: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make("chat", tmp_path / "a.jsonl", tmp_path / "unfinished", **options)
    layout.write_text("{% for message in messages %}{{ message.role + message.content + '</s>' }}{% endfor %}")
    with pytest.raises(PunaError, match=r"finished was made with template_digest .* choose another place"):
        make("chat", tmp_path / "a.jsonl", tmp_path / "finished", **options)
    with pytest.raises(PunaError, match="is being made with template_digest"):
        make("chat", tmp_path / "a.jsonl", tmp_path / "unfinished", **options)


def test_a_layout_whose_answers_have_no_end_is_told(make, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    for number, end in enumerate(("<|im_end|>", "</s>")):  # the vocabulary has the second only
        (tmp_path / "model").mkdir(exist_ok=True)
        layout = f"{{% for message in messages %}}{{{{ message.content + '{end}' }}}}{{% endfor %}}"
        (tmp_path / "model/chat_template.jinja").write_text(layout)
        make("chat", tmp_path / "a.jsonl", tmp_path / f"out{number}", template=str(tmp_path / "model"))
        assert ("do not end with a control token" in capsys.readouterr().err) == (end == "<|im_end|>")


def test_a_layout_that_another_tokenizer_would_write_otherwise_is_refused(make, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    (tmp_path / "model").mkdir()
    layout = "{{ bos_token }}{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    (tmp_path / "model/chat_template.jinja").write_text(layout)
    for eos_token in ("</s>", "<|im_end|>"):
        special = {"bos_token": "<s>", "eos_token": eos_token}
        (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(special))
        arguments = ("chat", tmp_path / "a.jsonl", tmp_path / f"out {len(eos_token)}")
        if eos_token == "</s>":
            make(*arguments, template=str(tmp_path / "model"))
        else:
            with pytest.raises(PunaError, match=r"the layout of .*model writes BOS or EOS otherwise than the files"):
                make(*arguments, template=str(tmp_path / "model"))


def test_another_layout_that_the_tokenizers_model_ships_is_told(make, small_tokenizer, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    shutil.copy(small_tokenizer.path, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (tmp_path / "chat_template.jinja").write_text(chat_template("vicuna").jinja)
    for template in ("vicuna", "plain"):
        prepare("chat", tmp_path / "a.jsonl", tmp_path / template, tokenizer=tmp_path, template=template)
        assert ("ships another layout of dialogs than plain" in capsys.readouterr().err) == (template == "plain")


def test_a_copy_of_what_is_held_out_later_does_not_stay_from_before(library, make, tmp_path, monkeypatch):
    pytest.importorskip("datasketch")
    source, options = shutil.copytree(library / "email", tmp_path / "src"), {"near_duplicates": True, "held_out": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_finish", lambda job: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make("code", source, tmp_path / "out", **options)
    max((tmp_path / "out/unfinished").glob("unit-*")).unlink()  # it was killed before the last unit
    names = [*sorted(file.name for file in source.glob("*.py")), *(f"zz{i}.py" for i in range(99))]
    is_trained_on = {name: not is_held_out(Document(name, "src", text=""), "code", 0.5) for name in names}
    trained_on = source / next(name for name in names if is_trained_on[name])
    last = next(name for name in names if name.startswith("zz") and not is_trained_on[name])
    (source / last).write_text(f"# a copy\n{trained_on.read_text()}")
    with pytest.raises(PunaError, match="the sources changed since"):
        make("code", source, tmp_path / "out", **options)


def test_pieces_that_the_model_has_no_embedding_for_are_not_counted(library, small_tokenizer, tmp_path):
    shutil.copy(small_tokenizer.path, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 1024}')
    (tmp_path / "config.json").write_text('{"vocab_size": 1024}')
    for number, named in enumerate((tmp_path, tmp_path / "tokenizer.model")):
        info = prepare("code", library / "json", tmp_path / f"out{number}", tokenizer=named, workers=2)
        assert info["tokenizer"]["vocab_size"] == 1024


def test_an_end_that_only_the_models_config_tells_goes_with_the_data(library, tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [], tokenizers.trainers.BpeTrainer(special_tokens=["[X]", "[Y]", "</s>"], initial_alphabet=alphabet)
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"vocab_size": 259, "bos_token_id": 0, "eos_token_id": [1, 2]}')
    prepare("code", library / "json", tmp_path / "out", tokenizer=tmp_path, workers=1)
    assert {(tokens[0], tokens[-1]) for tokens in documents_of(tmp_path / "out").values()} == {(0, 1)}
    again = load_tokenizer(tmp_path / "out/tokenizer")
    assert (again.bos_id, again.eos_id) == (0, 1)


def test_a_folder_of_something_else_is_not_touched(library, make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(PunaError, match="exists already and is not a prepared folder"):
        make("code", library, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == {"thesis.txt": b"years of work"}


# --- bad input


def test_an_empty_folder_says_so(make, tmp_path):
    (tmp_path / "src").mkdir()
    with pytest.raises(PunaError, match=r"there is nothing to prepare in .*src: it is empty"):
        make("code", tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_refused_at_the_first_look_can_be_given_right_into_the_same_folder(library, make, tmp_path):
    with pytest.raises(UsageError, match="pyton not known"):
        make("code", library / "json", tmp_path / "out", languages="pyton")
    assert not (tmp_path / "out").exists()
    assert make("code", library / "json", tmp_path / "out", languages="python")["documents"] > 0


@pytest.mark.parametrize("kind", ["link", "folder", "current"])
def test_a_refusal_at_the_first_look_leaves_a_folder_that_was_there_as_it_was(
    library, make, tmp_path, monkeypatch, kind
):
    folder = tmp_path / "there"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    output = {"link": tmp_path / "link", "folder": folder, "current": Path()}[kind]
    with pytest.raises(UsageError, match="pyton not known"):
        make("code", library / "json", output, languages="pyton")
    assert [path.name for path in folder.rglob("*")] == ["inner"]
    assert (tmp_path / "link").is_symlink()


def test_a_folder_without_anything_usable_says_why(make, tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_bytes(b"\xff")
    (tmp_path / "src/b.png").write_bytes(b"\xff")
    with pytest.raises(PunaError, match=r"nothing to prepare in .*; left out: 1 no known language, 1 not UTF-8"):
        make("code", tmp_path / "src", tmp_path / "out")


def test_what_is_missing_is_named_before_anything_is_made(library, small_tokenizer, tmp_path):
    with pytest.raises(PunaError, match="nowhere does not exist"):
        prepare("code", tmp_path / "nowhere", tmp_path / "out", tokenizer=small_tokenizer.path)
    (odd := tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(PunaError, match=r"caf\\udce9' is not UTF-8, .*; rename it"):
        prepare("code", odd, tmp_path / "out", tokenizer=small_tokenizer.path)
    with pytest.raises(PunaError, match="nothing does not exist; a tokenizer is"):
        prepare("code", library, tmp_path / "out", tokenizer=tmp_path / "nothing")
    with pytest.raises(UsageError, match="neither a chat template"):
        prepare("chat", library, tmp_path / "out", tokenizer=small_tokenizer.path, template="vikuna")
    with pytest.raises(UsageError, match="workers must be at least 1"):
        prepare("code", library, tmp_path / "out", tokenizer=small_tokenizer.path, workers=0)
    assert not (tmp_path / "out").exists()


# --- the ids of MindFormers' own tool


@pytest.fixture(scope="module")
def mindspore(shared) -> Path:
    return shared / "fixtures/mindspore"


@pytest.mark.parametrize(
    ("source", "rows", "equal", "not_usable"),
    [
        ("code_alpaca_tiny.json", "qa512", [0, 1, 2, 3, 4, 5, 7, 11], {6: "empty answer"}),
        ("code_alpaca_tiny_conversation.json", "qa512", [0, 1, 2, 3, 4, 5, 7, 11], {6: "empty answer"}),
        ("multi_turn_conversation.json", "multi_turn256", [0, 1], {2: "nothing to learn", 3: "empty answer"}),
    ],
)
def test_vicuna_dialogs_give_the_ids_and_targets_of_mindformers(mindspore, tmp_path, source, rows, equal, not_usable):
    path, out = mindspore / "preprocess" / source, tmp_path / "out"
    info = prepare("chat", path, out, tokenizer=mindspore / "tokenizer", template="vicuna")
    expected = np.load(mindspore / f"preprocess/{rows}_rows.npz")
    length = expected["input_ids"].shape[1]
    learned_there = [i for i, labels in enumerate(expected["labels"]) if (labels != -100).any()]
    assert learned_there == equal  # the others it masks: empty, or by mistake
    dataset = Dataset.open(out)
    found = {}
    for i in range(len(dataset)):
        id, _, tokens = dataset.document(i)
        targets = dataset.is_target(int(dataset.starts[i]), int(dataset.starts[i + 1]))
        found[int(id.rpartition(":")[2]) - 1] = tokens, np.where(targets, tokens, -100)
    for row in equal:
        tokens, labels = (padded(values, length, fill) for values, fill in zip(found[row], (0, -100), strict=True))
        assert tokens == expected["input_ids"][row].tolist()
        assert labels == expected["labels"][row].tolist()
    assert {int(id.rpartition(":")[2]) - 1: reason for id, reason in left_out(out).items()} == not_usable
    assert len(found) + sum(info["left_out"].values()) == len(expected["labels"])
    assert info["fill"] == "whole-documents"


def padded(values: np.ndarray, length: int, fill: int) -> list[int]:
    return (values.tolist() + [fill] * length)[:length]


# --- real data, whole


@pytest.mark.parametrize(
    "split", ["valid", "test", pytest.param("train", marks=pytest.mark.slow(reason="10.8 MB of text, split twice"))]
)
def test_the_whole_of_wikitext_2_goes_through(shared, tmp_path, split):
    path = shared / f"data/wikitext-2/wiki.{split}.tokens"
    info = prepare("wikitext", path, tmp_path / "out", tokenizer=shared / "data/tokenizer", workers=1)
    paragraphs = wikitext.paragraphs(wikitext.clean(path.read_text(encoding="utf-8")))
    assert info["documents"] == len(paragraphs) == {"valid": 533, "test": 614, "train": 5398}[split]
    assert info["sources"][str(path.resolve())]["bytes"] == path.stat().st_size
    ids = load_tokenizer(shared / "data/tokenizer").encode_batch(paragraphs, bos=True, eos=True)
    assert list(documents_of(tmp_path / "out").values()) == ids


def test_the_whole_of_code_alpaca_goes_through(shared, tmp_path):
    path = shared / "data/instruct/code_alpaca_2k.json"
    tokenizer = load_tokenizer(shared / "data/tokenizer")
    info = prepare("chat", path, tmp_path / "out", tokenizer=tokenizer.path, template="vicuna", workers=1)
    records = json.loads(path.read_text())
    unanswered = [i for i, record in enumerate(records) if not record["output"].strip()]
    assert info["documents"] + len(unanswered) == len(records) == 2017
    assert left_out(tmp_path / "out") == {f"{path.name}:{i + 1}": "empty answer" for i in unanswered}
    dataset = Dataset.open(tmp_path / "out")
    answers = [record["output"] for i, record in enumerate(records) if i not in unanswered]
    for i in range(0, len(dataset), 50):
        tokens = dataset.document(i)[2]
        targets = dataset.is_target(int(dataset.starts[i]), int(dataset.starts[i + 1]))
        assert tokens[targets][-1] == tokenizer.eos_id
        assert tokenizer.decode(tokens[targets]) == answers[i]


# --- the command line


def test_json_is_all_that_stands_on_stdout(library, small_tokenizer, tmp_path, capsys):
    arguments = ["prepare", "code", library / "json", "-o", tmp_path / "out", "--tokenizer", small_tokenizer.path]
    assert run(list(map(str, [*arguments, "--workers", 1, "--json"]))) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == read_json(tmp_path / "out/dataset.json")
    assert "MB/s" in printed.err
    assert "tokens/s" in printed.err


def test_a_kind_takes_its_own_options_only(tmp_path, capsys):
    assert run(["prepare", "wikitext", "a", "-o", "b", "--tokenizer", "c", "--fim-rate", "0.5"]) == 2
    assert "--fim-rate" in capsys.readouterr().err


def test_a_missing_source_is_a_message_not_a_traceback(small_tokenizer, tmp_path, capsys):
    arguments = ["prepare", "text", tmp_path / "nowhere", "-o", tmp_path / "out", "--tokenizer", small_tokenizer.path]
    assert run(list(map(str, arguments))) == 1
    assert capsys.readouterr().err == f"puna: {tmp_path / 'nowhere'} does not exist\n"
