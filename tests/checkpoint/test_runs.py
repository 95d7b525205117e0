"""Checkpoints of a run: whole or not there, exact to the bit, and never trusted unchecked."""

import errno
import itertools
import json
import os
import pydoc
import re
import signal
import subprocess
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from puna.checkpoint import manifest, runs
from puna.checkpoint.manifest import damage
from puna.checkpoint.runs import Checkpoints, checkpoints
from puna.errors import PunaError


def test_state_and_meta_come_back_to_the_last_bit(tmp_path):
    saved = some_state(seed=1)
    path = save(tmp_path, 7, saved, {"recipe": {"peak_lr": 1e-5}, "place": [3, 41]})
    loaded = some_state(seed=2)
    targets = [id(tensor) for _, tensor in flat(loaded)]
    assert Checkpoints(tmp_path).load(path, loaded) == {"recipe": {"peak_lr": 1e-5}, "place": [3, 41]}
    assert [id(tensor) for _, tensor in flat(loaded)] == targets
    assert_same(loaded, saved)


def test_a_part_of_the_state_can_be_loaded_alone(tmp_path):
    path = save(tmp_path, 1, some_state(seed=1), {})
    part = {"model": some_state(seed=2)["model"]}
    Checkpoints(tmp_path).load(path, part)
    assert torch.equal(part["model"]["weight"], some_state(seed=1)["model"]["weight"])


def test_the_folder_is_named_by_its_step_and_holds_its_manifest(tmp_path):
    path = save(tmp_path, 100, some_state(), {"a": 1})
    assert path == tmp_path / "checkpoints" / "step-00000100"
    written = json.loads((path / "run.json").read_text())
    assert written["step"] == 100
    assert written["meta"] == {"a": 1}
    assert set(written["files"]) == {str(file.relative_to(path)) for file in path.rglob("*.*")} - {"run.json"}
    assert set(written["files"]) == {
        f"{part}/{name}" for part in ("model", "rest") for name in (".metadata", "__0_0.distcp")
    }


def test_the_newest_k_and_every_nth_are_kept(tmp_path):
    for step in range(10, 90, 10):
        save(tmp_path, step, {"x": torch.ones(1)}, {}, keep=2, keep_every=30)
    assert list(checkpoints(tmp_path)) == [30, 60, 70, 80]
    assert Checkpoints(tmp_path).newest().name == "step-00000080"


def test_one_that_is_due_at_a_skipped_step_is_kept_for_good_all_the_same(tmp_path):
    for step in (10, 21, 30, 40, 50):
        save(tmp_path, step, {"x": torch.ones(1)}, {}, keep=1, keep_every=20)
    assert list(checkpoints(tmp_path)) == [21, 40, 50]


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert Checkpoints(tmp_path).newest() is None
    assert Checkpoints(tmp_path / "nothing").newest() is None


@pytest.mark.parametrize("part", ["model", "rest"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "no manifest", "half a manifest"])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_taken(tmp_path, harm, part):
    save(tmp_path, 1, some_state(), {"step": 1})
    newest = save(tmp_path, 2, some_state(), {"step": 2})
    file = newest / ("run.json" if "manifest" in harm else f"{part}/__0_0.distcp")
    content = file.read_bytes()
    if harm in ("missing", "no manifest"):
        file.unlink()
    elif harm == "flipped":
        file.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    else:
        file.write_bytes(content[: len(content) // 2])
    said: list[str] = []
    assert Checkpoints(tmp_path).newest(say=said.append).name == "step-00000001"
    assert len(said) == 1
    assert re.match(rf"{newest} is damaged \(.*{file.name}.*\); taking the checkpoint before it", said[0])


def test_a_flipped_bit_of_the_manifest_is_damage(tmp_path):
    meta = {"step": 2, "model_config": {"rope_theta": 1e6}}
    path = save(tmp_path, 2, {"x": torch.ones(1)}, meta)
    content = (path / "run.json").read_bytes()
    for place in range(0, 8 * len(content), 7):  # each bit of a byte comes up
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (path / "run.json").write_bytes(flipped)
        assert damage(path) is not None, (place, bytes(flipped))


def test_nothing_but_damaged_ones_is_an_error(tmp_path):
    path = save(tmp_path, 1, some_state(), {})
    (path / "model" / ".metadata").write_bytes(b"")
    with pytest.raises(PunaError, match=r"every checkpoint in .*checkpoints is damaged"):
        Checkpoints(tmp_path).newest(say=lambda _: None)


def test_a_damaged_one_is_replaced_when_the_run_comes_to_its_step_again(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, some_state(), {"life": 1})
    (tmp_path / "checkpoints" / "step-00000002" / "rest" / ".metadata").write_bytes(b"")
    save(tmp_path, 2, some_state(), {"life": 2}, keep=1)
    assert list(checkpoints(tmp_path)) == [2]
    assert Checkpoints(tmp_path).load(Checkpoints(tmp_path).newest(), some_state()) == {"life": 2}


def test_a_later_one_stays_until_the_run_has_come_to_its_step(tmp_path):
    for step in (9, 5, 6):
        save(tmp_path, step, some_state(), {}, keep=1)
    assert list(checkpoints(tmp_path)) == [6, 9]
    save(tmp_path, 10, some_state(), {}, keep=1)
    assert list(checkpoints(tmp_path)) == [10]


@pytest.mark.parametrize(
    ("keep", "after_20", "after_30"),
    [
        ({"keep": 1}, [20, 23], [30]),
        ({"keep": 2}, [10, 20, 23], [20, 30]),
        ({"keep": 1, "keep_every": 12}, [20, 23], [20, 30]),
    ],
)
def test_a_damaged_one_takes_no_sound_ones_place_and_goes_once_the_run_has_passed_it(
    tmp_path, keep, after_20, after_30
):
    for step in (10, 15, 23):
        path = save(tmp_path, step, some_state(), {})
        if step > 10:
            (path / "rest" / ".metadata").write_bytes(b"")
    run = Checkpoints(tmp_path, **keep)
    assert run.newest(say=lambda _: None).name == "step-00000010"
    for step, expected in ((20, after_20), (30, after_30)):
        run.save(step, some_state(), {})
        run.wait()
        assert list(checkpoints(tmp_path)) == expected


def test_one_that_was_damaged_and_is_replaced_counts_again(tmp_path):
    for step in (10, 20):
        path = save(tmp_path, step, some_state(), {})
    (path / "rest" / ".metadata").write_bytes(b"")
    run = Checkpoints(tmp_path, keep=2)
    run.newest(say=lambda _: None)
    for step in (20, 30):
        run.save(step, some_state(), {})
        run.wait()
    assert list(checkpoints(tmp_path)) == [20, 30]


def test_one_whose_reading_failed_for_the_moment_is_not_lost(tmp_path, monkeypatch):
    for step in (1, 3):
        save(tmp_path, step, some_state(), {})
    read = manifest.checksum_of

    def stale(path: Path) -> str:
        if "step-00000003" in str(path):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path)

    with monkeypatch.context() as broken:
        broken.setattr(manifest, "checksum_of", stale)
        assert Checkpoints(tmp_path).newest(say=lambda _: None).name == "step-00000001"
        save(tmp_path, 2, some_state(), {})
    assert Checkpoints(tmp_path).newest(say=pytest.fail).name == "step-00000003"


def test_a_save_that_was_killed_is_ignored_and_cleared_away_by_the_next(tmp_path):
    save(tmp_path, 1, some_state(), {})
    left = tmp_path / "checkpoints" / "step-00000002.aside"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert Checkpoints(tmp_path).newest().name == "step-00000001"
    save(tmp_path, 2, some_state(), {})
    assert sorted(path.name for path in left.parent.iterdir()) == ["step-00000001", "step-00000002"]


def test_the_note_that_nothing_was_saved_is_there_until_something_is(tmp_path, monkeypatch):
    note, run = tmp_path / ".unsaved", Checkpoints(tmp_path)
    run.note_unsaved()
    for work in ("manifest.write_json", "runs._put_in_place"):
        with monkeypatch.context() as broken:
            broken.setattr(f"puna.checkpoint.{work}", full)
            run.save(1, some_state(), {})
            with pytest.raises(OSError, match="No space left"):
                run.wait()
        assert note.exists(), work
    run.save(2, some_state(), {})
    run.wait()
    run.note_unsaved()
    assert not note.exists()
    note.touch()  # of a run whose checkpoints were put there by hand, or by an earlier version
    run.note_unsaved()
    assert not note.exists()


def test_a_process_killed_at_any_moment_leaves_a_sound_newest_checkpoint(tmp_path, processes):
    steps, sent = processes.Pipe(duplex=False)
    process = processes.Process(target=save_for_ever, args=(str(tmp_path), sent))
    process.start()
    for _ in range(4):
        done = steps.recv()
    time.sleep(0.013)
    process.kill()
    process.join()
    newest = Checkpoints(tmp_path).newest(say=pytest.fail)
    state = {"x": torch.zeros(3_000_000)}
    step = Checkpoints(tmp_path).load(newest, state)["step"]
    assert step >= done == 4
    assert state["x"].unique().tolist() == [step]


def save_for_ever(folder: str, sent: Connection) -> None:
    run = Checkpoints(folder, keep=2)
    for step in itertools.count(1):
        run.save(step, {"x": torch.full((3_000_000,), float(step))}, {"step": step})
        run.wait()
        sent.send(step)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "work",
    [
        "runs._clear_leftovers",
        "sharded.FileSystemWriter.write_data",
        "sharded.FileSystemWriter.finish",
        "runs.fingerprints",
        "manifest.write_json",
        "runs._put_in_place",
        "runs._prune",
        "runs._remove",
        "runs.shutil.rmtree",
    ],
)
def test_a_process_killed_at_any_stage_of_a_save_leaves_a_sound_newest_checkpoint(tmp_path, processes, work, moment):
    process = processes.Process(target=die_in_the_second_save, args=(str(tmp_path), work, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    state = some_state(seed=9)
    step = Checkpoints(tmp_path).load(Checkpoints(tmp_path).newest(say=pytest.fail), state)["step"]
    assert step in (1, 2)
    assert torch.equal(state["model"]["weight"], some_state(seed=step)["model"]["weight"])
    save(tmp_path, 3, state, {"step": 3}, keep=1)  # the next save finds its way
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def die_in_the_second_save(folder: str, work: str, moment: str) -> None:
    run = Checkpoints(folder, keep=1)
    run.save(1, some_state(seed=1), {"step": 1})
    run.wait()
    original = pydoc.locate(f"puna.checkpoint.{work}")

    def dying(*arguments: object, **options: object) -> object:
        if moment == "after":
            original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    with patch(f"puna.checkpoint.{work}", dying):
        run.save(2, some_state(seed=2), {"step": 2})
        run.wait()


def test_what_is_saved_is_the_state_at_the_call(tmp_path, monkeypatch):
    may_write, state, meta = threading.Event(), some_state(seed=1), {"step": 1}
    monkeypatch.setattr(runs, "_clear_leftovers", lambda _: may_write.wait())
    run = Checkpoints(tmp_path)
    path = run.save(1, state, meta)
    assert Checkpoints(tmp_path).newest() is None  # the caller goes on, nothing is written yet
    for values in (state["model"]["weight"], state["optimizer"]["state"][0]["exp_avg"], state["generator"]):
        values.zero_()
    state["optimizer"]["param_groups"][0]["lr"] = meta["step"] = 99
    may_write.set()
    run.wait()
    assert Checkpoints(tmp_path).newest() == path
    assert_same(load(path), some_state(seed=1))
    assert manifest.read_meta(path) == {"step": 1}


def test_one_save_waits_for_the_other_and_uses_its_memory_again(tmp_path):
    run = Checkpoints(tmp_path)
    places = set()
    for seed in (1, 2, 3):
        run.save(seed, some_state(seed), {})
        places.add(run._copies["model.weight"].data_ptr())
    assert len(places) == 1
    assert run.newest().name == "step-00000003"  # waits too
    for step, path in checkpoints(tmp_path).items():
        assert_same(load(path), some_state(seed=step))


def test_without_room_for_a_copy_the_state_is_written_before_training_goes_on(tmp_path, monkeypatch, capfd):
    free = [1000]
    monkeypatch.setattr(runs, "free_host_bytes", lambda: free[0])
    run, state = Checkpoints(tmp_path), some_state(seed=1)
    for step in (1, 2):
        path = run.save(step, state, {})
        assert (Checkpoints(tmp_path).newest(), run._copies) == (path, {})
    said = capfd.readouterr().err
    assert said.count("training waits while checkpoints are written: copies of the state would take") == 1
    state["model"]["weight"].zero_()
    assert_same(load(path), some_state(seed=1))
    with monkeypatch.context() as broken:
        broken.setattr(manifest, "write_json", full)
        run.save(3, state, {})
    with pytest.raises(OSError, match="No space left"):
        run.wait()
    for free[0] in (1 << 40, 0):  # copies that are there stay
        run.save(4, state, {})
        assert run._copies


def test_what_fails_in_the_background_is_raised_once_by_the_next_call(tmp_path, monkeypatch):
    run = Checkpoints(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(manifest, "write_json", full)
        run.save(1, some_state(), {})
        with pytest.raises(OSError, match="No space left"):
            run.save(2, some_state(), {})
    run.wait()
    run.save(3, some_state(), {})
    run.wait()
    assert list(checkpoints(tmp_path)) == [3]


def test_a_full_disk_is_an_os_error_and_leaves_the_ones_before(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        save(place, 1, {"x": torch.ones(1000)}, {})
        with pytest.raises(OSError, match="No space left on device") as caught:
            save(place, 2, {"x": torch.ones(1_000_000)}, {})
        assert caught.value.errno == errno.ENOSPC
        assert [path.name for path in (place / "checkpoints").iterdir()] == ["step-00000001"]
        assert Checkpoints(place).newest(say=pytest.fail).name == "step-00000001"
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_failure_while_writing_leaves_the_ones_before(tmp_path, monkeypatch):
    before = save(tmp_path, 1, some_state(), {})
    monkeypatch.setattr("puna.checkpoint.manifest.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, some_state(), {}, keep=1)
    assert list(before.parent.iterdir()) == [before]
    assert damage(before) is None


def test_what_cannot_be_removed_ends_no_save_and_is_tried_again(tmp_path, monkeypatch, capfd):
    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    save(tmp_path, 1, some_state(seed=1), {})
    with monkeypatch.context() as broken:
        broken.setattr(os, "rmdir", busy)  # as on NFS, where someone reads a file that is removed
        for step in (2, 3):
            assert_same(load(save(tmp_path, step, some_state(seed=step), {}, keep=1)), some_state(seed=step))
        assert list(checkpoints(tmp_path)) == [3]
        broken.setattr(runs, "_remove", busy)
        save(tmp_path, 4, some_state(), {}, keep=1)
    assert "checkpoints that need not be kept could not be removed: [Errno 16]" in capfd.readouterr().err
    save(tmp_path, 5, some_state(), {}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda model: model.update(more=torch.ones(1)), r"has no model\.more; it is a checkpoint of another model"),
        (lambda model: model.pop("weight"), r"holds model\.weight, which the run does not have"),
        (
            lambda model: model.update(weight=torch.ones(2, 2)),
            r"model\.weight was saved as \(30, 40\) torch\.float32, but",
        ),
        (
            lambda model: model.update(weight=model["weight"].half()),
            r"model\.weight was saved as .*float32, but .*float16",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_named(tmp_path, edit, message):
    path = save(tmp_path, 1, some_state(), {})
    state = some_state()
    edit(state["model"])
    with pytest.raises(PunaError, match=message):
        Checkpoints(tmp_path).load(path, state)


def save(folder, step, state, meta, **keep):
    """Saves as a run does, and waits for it."""
    run = Checkpoints(folder, **keep)
    path = run.save(step, state, meta)
    run.wait()
    return path


def load(path):
    state = some_state(seed=9)
    Checkpoints(path.parents[1]).load(path, state)
    return state


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def assert_same(one, two):
    for (name, left), (_, right) in zip(flat(one), flat(two), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)), name
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    assert one["skipped"] == two["skipped"]


def some_state(seed: int = 0) -> dict[str, object]:
    """What a run keeps: weights of several dtypes, also transposed, optimizer states, a generator, plain values."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(30, 40, generator=g)
    return {
        "model": {"weight": weight, "turned": torch.randn(5, 3, generator=g).t(), "half": weight[0].bfloat16()},
        "optimizer": {
            "state": {0: {"exp_avg": torch.randn(30, 40, generator=g), "step": torch.tensor(float(seed))}},
            "param_groups": [{"lr": 0.1 * seed, "betas": (0.9, 0.95), "params": ["weight"]}],
        },
        "generator": g.get_state(),
        "skipped": seed,
    }


def flat(value: object, name: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [pair for key, inner in items for pair in flat(inner, f"{name}.{key}")]
