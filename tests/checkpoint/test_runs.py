"""Checkpoints of a run: whole or not there, exact to the bit, and never trusted unchecked."""

import errno
import itertools
import json
import os
import re
import subprocess
import time
from multiprocessing.connection import Connection

import pytest
import torch

from puna.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from puna.checkpoint.runs import checkpoints, damage
from puna.errors import PunaError


def test_state_and_meta_come_back_to_the_last_bit(tmp_path):
    saved = some_state(seed=1)
    path = save_checkpoint(tmp_path, 7, saved, {"recipe": {"peak_lr": 1e-5}, "place": [3, 41]})
    loaded = some_state(seed=2)
    targets = [id(tensor) for _, tensor in flat(loaded)]
    assert load_checkpoint(path, loaded) == {"recipe": {"peak_lr": 1e-5}, "place": [3, 41]}
    assert [id(tensor) for _, tensor in flat(loaded)] == targets
    for (name, one), (_, two) in zip(flat(saved), flat(loaded), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8)), name
    assert loaded["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    assert loaded["skipped"] == 1


def test_a_part_of_the_state_can_be_loaded_alone(tmp_path):
    path = save_checkpoint(tmp_path, 1, some_state(seed=1), {})
    part = {"model": some_state(seed=2)["model"]}
    load_checkpoint(path, part)
    assert torch.equal(part["model"]["weight"], some_state(seed=1)["model"]["weight"])


def test_the_folder_is_named_by_its_step_and_holds_its_manifest(tmp_path):
    path = save_checkpoint(tmp_path, 100, some_state(), {"a": 1})
    assert path == tmp_path / "checkpoints" / "step-00000100"
    manifest = json.loads((path / "run.json").read_text())
    assert manifest["step"] == 100
    assert manifest["meta"] == {"a": 1}
    assert set(manifest["files"]) == {str(file.relative_to(path)) for file in path.rglob("*.*")} - {"run.json"}
    assert set(manifest["files"]) == {
        f"{part}/{name}" for part in ("model", "rest") for name in (".metadata", "__0_0.distcp")
    }


def test_the_newest_k_and_every_nth_are_kept(tmp_path):
    for step in range(10, 90, 10):
        save_checkpoint(tmp_path, step, {"x": torch.ones(1)}, {}, keep=2, keep_every=30)
    assert list(checkpoints(tmp_path)) == [30, 60, 70, 80]
    assert newest_checkpoint(tmp_path).name == "step-00000080"


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("part", ["model", "rest"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "no manifest", "half a manifest"])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_taken(tmp_path, harm, part):
    save_checkpoint(tmp_path, 1, some_state(), {"step": 1})
    newest = save_checkpoint(tmp_path, 2, some_state(), {"step": 2})
    file = newest / ("run.json" if "manifest" in harm else f"{part}/__0_0.distcp")
    content = file.read_bytes()
    if harm in ("missing", "no manifest"):
        file.unlink()
    elif harm == "flipped":
        file.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    else:
        file.write_bytes(content[: len(content) // 2])
    said: list[str] = []
    assert newest_checkpoint(tmp_path, say=said.append).name == "step-00000001"
    assert len(said) == 1
    assert re.match(rf"{newest} is damaged \(.*{file.name}.*\); taking the checkpoint before it", said[0])


def test_nothing_but_damaged_ones_is_an_error(tmp_path):
    path = save_checkpoint(tmp_path, 1, some_state(), {})
    (path / "model" / ".metadata").write_bytes(b"")
    with pytest.raises(PunaError, match=r"every checkpoint in .*checkpoints is damaged"):
        newest_checkpoint(tmp_path, say=lambda _: None)


def test_a_damaged_one_is_replaced_when_the_run_comes_to_its_step_again(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, some_state(), {"life": 1})
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "rest" / ".metadata").write_bytes(b"")
    save_checkpoint(tmp_path, 2, some_state(), {"life": 2}, keep=1)
    assert list(checkpoints(tmp_path)) == [2]  # the damaged third one no longer stands in the way
    assert load_checkpoint(newest_checkpoint(tmp_path), some_state()) == {"life": 2}


def test_a_sound_later_one_is_left_alone(tmp_path):
    for step in (9, 5, 6):
        save_checkpoint(tmp_path, step, some_state(), {}, keep=1)
    assert list(checkpoints(tmp_path)) == [6, 9]


def test_a_save_that_was_killed_is_ignored_and_cleared_away_by_the_next(tmp_path):
    save_checkpoint(tmp_path, 1, some_state(), {})
    left = tmp_path / "checkpoints" / "step-00000002.aside"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    save_checkpoint(tmp_path, 2, some_state(), {})
    assert sorted(path.name for path in left.parent.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_process_killed_at_any_moment_leaves_a_sound_newest_checkpoint(tmp_path, processes):
    steps, sent = processes.Pipe(duplex=False)
    process = processes.Process(target=save_for_ever, args=(str(tmp_path), sent))
    process.start()
    for _ in range(4):
        done = steps.recv()
    time.sleep(0.013)
    process.kill()
    process.join()
    newest = newest_checkpoint(tmp_path, say=pytest.fail)
    state = {"x": torch.zeros(3_000_000)}
    step = load_checkpoint(newest, state)["step"]
    assert step >= done == 4
    assert state["x"].unique().tolist() == [step]


def save_for_ever(folder: str, sent: Connection) -> None:
    for step in itertools.count(1):
        save_checkpoint(folder, step, {"x": torch.full((3_000_000,), float(step))}, {"step": step}, keep=2)
        sent.send(step)


def test_a_full_disk_is_an_os_error_and_leaves_the_ones_before(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        save_checkpoint(place, 1, {"x": torch.ones(1000)}, {})
        with pytest.raises(OSError, match="No space left on device") as caught:
            save_checkpoint(place, 2, {"x": torch.ones(1_000_000)}, {})
        assert caught.value.errno == errno.ENOSPC
        assert [path.name for path in (place / "checkpoints").iterdir()] == ["step-00000001"]
        assert newest_checkpoint(place, say=pytest.fail).name == "step-00000001"
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_failure_while_writing_leaves_the_ones_before(tmp_path, monkeypatch):
    before = save_checkpoint(tmp_path, 1, some_state(), {})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("puna.checkpoint.runs.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, some_state(), {}, keep=1)
    assert list(before.parent.iterdir()) == [before]
    assert damage(before) is None


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
    path = save_checkpoint(tmp_path, 1, some_state(), {})
    state = some_state()
    edit(state["model"])
    with pytest.raises(PunaError, match=message):
        load_checkpoint(path, state)


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
