"""Export: the run's weights to the last bit, without its optimizer, in little memory."""

import errno
import json
import pickle
import threading
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorProperties

from puna.checkpoint import convert, export, load, manifest, sharded
from puna.checkpoint.runs import Checkpoints
from puna.checkpoint.sharded import open_sharded, read_sharded, stored_forms
from puna.cli import run
from puna.errors import PunaError
from puna.testing import tiny_model, write_tiny_model
from puna.tokenizer import load_tokenizer


@pytest.fixture
def run_dir(tmp_path):
    """A run with checkpoints of seeds 1 and 2 at steps 10 and 20, and a tokenizer."""
    folder = tmp_path / "run"
    for seed in (1, 2):
        keep_model(folder, tiny_model(seed), step=10 * seed)
    load_tokenizer(write_tiny_model(tmp_path / "other")).save(folder / "tokenizer")
    return folder


def test_the_newest_weights_are_exported_bit_for_bit(run_dir, tmp_path):
    assert export(run_dir, tmp_path / "out") == tmp_path / "out"
    state = tiny_model(2).state_dict()
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], values) for name, values in state.items())


def test_a_step_can_be_chosen_and_a_dtype(run_dir, tmp_path):
    export(run_dir, tmp_path / "out", step=10, dtype="bf16")
    model, state = load(tmp_path / "out")[0], tiny_model(1).state_dict()
    assert all(torch.equal(values, state[name].bfloat16()) for name, values in model.state_dict().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_weights_that_fp16_cannot_say_are_refused_by_name(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = -131_072
    keep_model(tmp_path / "run", model)
    said = r"lm_head\.weight holds -131072, and fp16 has no numbers beyond 65,504; take bf16 instead"
    with pytest.raises(PunaError, match=said):
        export(tmp_path / "run", tmp_path / "out", dtype="fp16")
    export(tmp_path / "run", tmp_path / "whole", dtype="bf16")
    with pytest.raises(PunaError, match=said):
        convert(tmp_path / "whole", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_a_tied_run_exports_tied(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    keep_model(tmp_path / "run", model)
    export(tmp_path / "run", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(load(tmp_path / "out")[0].lm_head.weight, model.lm_head.weight)


def test_the_runs_tokenizer_goes_along(run_dir, tmp_path):
    export(run_dir, tmp_path / "out")
    _, tokenizer = load(tmp_path / "out")
    assert tokenizer.sha256 == load_tokenizer(run_dir / "tokenizer").sha256


def test_settings_for_generation_beside_the_runs_tokenizer_go_along(run_dir, tmp_path):
    sampling = {"do_sample": True, "top_k": 20}
    (tmp_path / "other/generation_config.json").write_text(json.dumps({**sampling, "eos_token_id": 5}))
    load_tokenizer(tmp_path / "other").save(run_dir / "tokenizer")
    export(run_dir, tmp_path / "out")
    ends = load(tmp_path / "out")[0].config.eos_token_id
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == {**sampling, "bos_token_id": 1, "eos_token_id": ends}
    assert 5 not in ends


def test_transposed_and_partial_tensors_are_read_as_they_were(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    state = {
        "turned": whole.t(),
        "row": whole[1],
        "columns": whole[:, 1:3],
        "scalar": torch.tensor(5),
        "none": whole[:0],
    }
    path = save(tmp_path, 1, {"model": state}, {})
    stored = open_sharded(path / "model", "model")
    assert stored.keys() == state.keys()
    for name, values in state.items():
        assert (stored[name].shape, stored[name].dtype) == (tuple(values.shape), values.dtype)
        assert torch.equal(stored[name].read(), values)


def test_what_many_ranks_saved_is_exported_as_if_one_had_file_by_file_and_in_little_memory(
    tmp_path, processes, peak_anonymous_bytes
):
    model = wide_model()
    keep_model(tmp_path / "one", model)
    export(tmp_path / "one", tmp_path / "of-one")
    ranks = [processes.Process(target=keep_sharded, args=(rank, str(tmp_path))) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(list((tmp_path / "four" / "checkpoints").rglob("model/*.distcp"))) == 4
    peak = peak_anonymous_bytes(export, tmp_path / "four", tmp_path / "of-four")
    assert_same_files(tmp_path / "of-one", tmp_path / "of-four")
    largest = model.lm_head.weight.nbytes
    assert peak < largest + 8_000_000 < sum(values.nbytes for values in model.parameters())


def keep_sharded(rank: int, folder: str) -> None:
    """Saves a model from four processes: rows and columns over two, and of each part rows over two."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = wide_model()
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    parallelize_module(model, mesh["tp"], {**plan, "lm_head": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    keep_model(f"{folder}/four", model)
    dist.destroy_process_group()


def wide_model():
    return tiny_model(vocab_size=16_000, hidden_size=256)


def assert_same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_what_exists_is_not_touched(run_dir, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(PunaError, match=r"out exists already; choose another place"):
        export(run_dir, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_optimizers_states_are_not_even_opened(run_dir, tmp_path):
    for file in (run_dir / "checkpoints" / "step-00000020" / "rest").iterdir():
        file.unlink()
    export(run_dir, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[0].lm_head.weight, tiny_model(2).lm_head.weight)


def test_a_step_that_is_not_there_lists_those_that_are(run_dir, tmp_path):
    with pytest.raises(PunaError, match="has no checkpoint of step 15; there are 10, 20"):
        export(run_dir, tmp_path / "out", step=15)


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(PunaError, match="there is no run folder"):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(PunaError, match="has no checkpoints"):
        export(tmp_path, tmp_path / "out")


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(run_dir, tmp_path):
    (run_dir / "checkpoints" / "step-00000020" / "model" / ".metadata").write_bytes(b"")
    with pytest.raises(PunaError, match=r"step-00000020 is damaged \(model/\.metadata has 0 of"):
        export(run_dir, tmp_path / "out", step=20)
    export(run_dir, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[0].lm_head.weight, tiny_model(1).lm_head.weight)


def test_bytes_that_were_changed_are_found_while_they_are_copied(run_dir, tmp_path, capsys):
    file = run_dir / "checkpoints" / "step-00000020" / "model" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        PunaError, match=r"step-00000020 is damaged \(model/__0_0\.distcp has other bytes.*another step"
    ):
        export(run_dir, tmp_path / "out", step=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]
    export(run_dir, tmp_path / "out")
    assert "step-00000020 is damaged" in capsys.readouterr().err
    assert torch.equal(load(tmp_path / "out")[0].lm_head.weight, tiny_model(1).lm_head.weight)


def test_a_full_disk_is_said_at_once_and_not_when_the_checkpoint_has_been_checked(run_dir, tmp_path, monkeypatch):
    is_over, checksum = threading.Event(), manifest.checksum_of

    def checksum_late(file):
        return checksum(file) if file.name == ".metadata" or is_over.wait(5) else "not waited for"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "checksum_of", checksum_late)
    monkeypatch.setattr("puna.checkpoint.weights.write_safetensors", full)
    with pytest.raises(OSError, match="No space left on device"):
        export(run_dir, tmp_path / "out")
    is_over.set()


@pytest.mark.parametrize("moment", ["before it is checked", "after it was checked"])
def test_a_checkpoint_that_training_replaces_meanwhile_gives_way_to_the_newer_one(
    run_dir, tmp_path, monkeypatch, capsys, moment
):
    opened = sharded.open_sharded

    def replacing(path, key):
        if "step-00000020" in str(path):
            if moment.startswith("after"):
                time.sleep(0.2)
            keep_model(run_dir, tiny_model(3), step=30, keep=1)
        return opened(path, key)

    monkeypatch.setattr(sharded, "open_sharded", replacing)
    export(run_dir, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[0].lm_head.weight, tiny_model(3).lm_head.weight)
    said = capsys.readouterr().err
    assert "step-00000020 was removed meanwhile" in said
    assert "damaged" not in said


def test_an_error_that_damage_explains_is_called_damage(run_dir, tmp_path):
    file = run_dir / "checkpoints" / "step-00000020" / "model" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(PunaError, match=r"step-00000020 is damaged \(model/__0_0\.distcp has 1,000 of"):
        export(run_dir, tmp_path / "out", step=20)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: open_sharded(path, "model"),
        lambda path: read_sharded(path, {"model": tiny_model().state_dict()}),
        stored_forms,
    ],
)
def test_code_in_a_checkpoint_is_not_run(tmp_path, read):
    keep_model(tmp_path / "run", tiny_model())
    path = tmp_path / "run/checkpoints/step-00000001/model"
    (path / ".metadata").write_bytes(f"cos\nmkdir\n(V{tmp_path / 'made'}\ntR.".encode())  # a pickle
    with pytest.raises(PunaError, match=r"model/\.metadata asks for os\.mkdir, which no checkpoint needs"):
        read(path)
    assert not (tmp_path / "made").exists()


def test_checkpoints_of_other_releases_of_python_and_torch_are_read(tmp_path, monkeypatch):
    model = tiny_model()
    keep_model(tmp_path / "run", model)
    file = tmp_path / "run/checkpoints/step-00000001/model/.metadata"
    metadata, of_torch = pickle.loads(file.read_bytes()), TensorProperties.__getstate__
    with monkeypatch.context() as patch:  # torch 2.15 writes strides too
        patch.setattr(TensorProperties, "__getstate__", lambda self: (*of_torch(self)[:5], None))
        content = pickle.dumps(metadata, protocol=2)
    file.write_bytes(content.replace(b"cpathlib\n", b"cpathlib._local\n"))  # as Python 3.13 has it
    stored = open_sharded(file.parent, "model")
    assert all(torch.equal(stored[name].read(), values) for name, values in model.state_dict().items())


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_export_takes_the_memory_of_less_than_one_copy(tmp_path, peak_anonymous_bytes, dtype):
    model = wide_model()
    weights = sum(values.nbytes for values in model.parameters())
    keep_model(tmp_path / "run", model, optimizer_copies=2)
    peak = peak_anonymous_bytes(partial(export, dtype=dtype), tmp_path / "run", tmp_path / "out")
    largest = 16_000 * 256 * 2 if dtype else 0  # mapped as they are, or rounded one by one
    assert largest + 16_000_000 < weights
    assert peak < largest + 16_000_000


def test_the_command_prints_the_folder(run_dir, tmp_path, capsys):
    assert run(["export", str(run_dir), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path / "out")}
    assert run(["export", str(run_dir), "-o", str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert run(["export", str(run_dir), "-o", str(tmp_path / "new"), "--dtype", "fp8"]) == 2
    assert "there are fp32, bf16, fp16" in capsys.readouterr().err


def save(folder, step, state, meta, **options):
    run = Checkpoints(folder, **options)
    path = run.save(step, state, meta)
    run.wait()
    return path


def keep_model(folder, model, step=1, optimizer_copies=1, **options):
    """Saves a checkpoint as training does."""
    state = {"model": model.state_dict(), "optimizer": {}}
    for number in range(optimizer_copies):
        state["optimizer"][f"moment{number}"] = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    save(folder, step, state, {"model_config": model.config.to_json()}, **options)
