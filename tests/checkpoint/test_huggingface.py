"""Loading and saving the Hugging Face layout: exact, lean, and strict about every tensor and file."""

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.checkpoint import convert, load, load_config, quantize, resolve, save_model
from puna.checkpoint.huggingface import build_model, parameter_shapes
from puna.checkpoint.tensors import StoredTensor
from puna.errors import PunaError, UsageError
from puna.model.config import preset
from puna.testing import tiny_model, write_tiny_model
from puna.tokenizer import load_tokenizer, train_tokenizer
from puna.tokenizer.base import SPACE_MARK

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in one file."""
    save_model(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in several files."""
    monkeypatch.setattr("puna.checkpoint.weights.SHARD_BYTES", 100_000)
    save_model(tiny_model(), tmp_path / "sharded")
    return tmp_path / "sharded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_tensors_come_back_bit_for_bit(tmp_path, monkeypatch, dtype, shard_bytes):
    monkeypatch.setattr("puna.checkpoint.weights.SHARD_BYTES", shard_bytes)
    source = {name: all_bit_patterns(shape, dtype) for name, shape in parameter_shapes(preset("tiny-64")).items()}
    model = build_model(preset("tiny-64"), {name: StoredTensor.of(values) for name, values in source.items()})
    save_model(model, tmp_path / "a")
    save_model(load(tmp_path / "a")[0], tmp_path / "b")
    stored = {}
    for file in (tmp_path / "b").glob("*.safetensors"):
        stored.update(load_file(file))
    assert stored.keys() == source.keys()
    for name, values in source.items():
        assert stored[name].dtype == dtype
        assert torch.equal(stored[name].view(torch.uint8), values.view(torch.uint8)), name


def test_shards_respect_the_limit_and_the_index_names_every_tensor(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(sharded.glob("model-*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    sizes = {file.name: sum(t.nbytes for t in load_file(file).values()) for file in files}
    assert max(sizes[file.name] for file in files if len(load_file(file)) > 1) <= 100_000
    assert index["metadata"]["total_size"] == sum(sizes.values()) == 4 * tiny_model().config.parameter_count
    assert all(name in load_file(sharded / file) for name, file in index["weight_map"].items())


def test_mixed_dtypes_stay_as_they_are_stored_unless_another_is_asked_for(folder):
    change(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].bfloat16()}))
    model = load(folder)[0]
    assert model.get_parameter(Q_PROJ).dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32
    save_model(model, folder.with_name("again"))  # tensors of 2 and 4 bytes side by side in one file
    again = load(folder.with_name("again"))[0]
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {p.dtype for p in load(folder, dtype="fp16")[0].parameters()} == {torch.float16}


def test_weights_beyond_fp16_are_not_loaded_as_infinite_ones(folder):
    change(folder, lambda tensors: tensors[Q_PROJ][1].fill_(-70_000))
    with pytest.raises(PunaError, match=rf"{Q_PROJ} holds -70000, and fp16 .* 65,504; take bf16"):
        load(folder, dtype="fp16")


def test_an_unknown_dtype_lists_those_there_are(folder):
    with pytest.raises(UsageError, match="no dtype is called 'int3'; there are fp32, bf16, fp16"):
        load(folder, dtype="int3")


def test_a_tied_model_stores_its_head_once_and_stays_tied(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    save_model(model, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    loaded = load(tmp_path / "tied")[0]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_model_whose_file_repeats_the_head_loads_if_the_two_are_equal(tmp_path, dtype):
    model, folder = tiny_model(tie_word_embeddings=True), tmp_path / "tied"
    model.lm_head.weight.data[-1] = torch.nan
    save_model(model, folder)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": model.lm_head.weight.detach().to(dtype)}))
    assert same_bits(load(folder)[0].lm_head.weight, model.lm_head.weight)
    change(folder, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(PunaError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but .* ties them"):
        load(folder)


def test_loaded_weights_can_be_trained_and_outlive_their_file(folder):
    model = load(folder)[0]
    before = model.lm_head.weight.detach().clone()
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(model.lm_head.weight, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_old_rotary_tables_are_skipped(folder):
    change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert load(folder)[0].config == tiny_model().config


def test_a_missing_tensor_is_named(folder):
    change(folder, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(PunaError, match=rf"model\.safetensors lacks {Q_PROJ}, which config\.json asks for"):
        load(folder)


def test_an_unknown_tensor_is_named(folder):
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(PunaError, match=r"holds model\.layers\.0\.self_attn\.q_proj\.bias, which .* does not have"):
        load(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    change(folder, lambda tensors: tensors.update({Q_PROJ: torch.ones(64, 32)}))
    with pytest.raises(PunaError, match=rf"{Q_PROJ} has shape \(64, 32\), config\.json makes it \(64, 64\)"):
        load(folder)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_codes_are_not_taken_for_weights(folder, dtype):
    change(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(getattr(torch, dtype))}))
    with pytest.raises(PunaError, match=rf"{Q_PROJ} is stored as {dtype}, but config\.json names no quantisation"):
        load(folder)


def test_a_vocabulary_that_does_not_fit_the_tensors_is_named(folder):
    edit_json(folder / "config.json", vocab_size=500)
    with pytest.raises(PunaError, match=r"embed_tokens\.weight .*; its vocab_size is 500, the weights' is 512"):
        load(folder)


def test_a_file_that_the_index_names_and_is_not_there_is_named(sharded):
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    file.unlink()
    with pytest.raises(PunaError, match=rf"{file.name} does not exist, but model\.safetensors\.index\.json names it"):
        load(sharded)


def test_one_file_beside_an_index_of_others_is_refused(sharded):
    stale = sharded / "model.safetensors"  # transformers reads it, and not what the index names
    save_file(dict(tiny_model(seed=1).named_parameters()), stale)
    with pytest.raises(
        PunaError, match=r"holds model\.safetensors, and model\.safetensors\.index\.json names other files"
    ):
        load(sharded)
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(stale), stale.name)}))
    assert torch.equal(load(sharded)[0].lm_head.weight, tiny_model(seed=1).lm_head.weight)


@pytest.mark.parametrize("weight_map", [None, ["file"], {"a": 1, "b": "file"}, {"a": ["file"]}])
def test_an_index_that_names_no_files_is_refused(sharded, weight_map):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(PunaError, match=r'index\.json has no "weight_map" from names of tensors to names of files'):
        load(sharded)


def test_a_tensor_in_two_files_is_named_with_both(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    with pytest.raises(PunaError, match=rf"{name} is in {second.name} and in {first.name}"):
        load(sharded)


def test_a_file_without_a_tensor_that_the_index_promises_is_named(sharded):
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**{k: v for k, v in tensors.items() if k != name}, "filler": torch.ones(1)}, file)
    with pytest.raises(
        PunaError, match=rf"{file.name} lacks {name}, which model\.safetensors\.index\.json says it holds"
    ):
        load(sharded)


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, -1])
def test_a_file_that_is_cut_off_is_named(folder, kept_bytes):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(PunaError, match=r"model\.safetensors is damaged or cut off"):
        load(folder)


def test_an_empty_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(PunaError, match=r"has no config\.json; a model is a folder in Hugging Face layout"):
        load(tmp_path)
    shutil.copy(saved_config(tmp_path), tmp_path)
    with pytest.raises(PunaError, match=r"holds no weights: there is neither model\.safetensors nor"):
        load(tmp_path)


def test_a_run_folder_in_place_of_a_model_says_how_to_export_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(PunaError, match=r"is a training run, not a model; write one with `puna export \S+ -o DIR`"):
        load(tmp_path)


def test_quantised_weights_are_refused(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(PunaError, match=r"config\.json: the weights are quantised"):
        load_config(folder)


def test_a_bin_file_loads_equal_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = load(folder)[0]
    assert all(same_bits(parameter, tensors[name]) for name, parameter in model.named_parameters())


def test_a_bin_file_of_before_zip_loads_too(folder):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert same_bits(load(folder)[0].get_parameter(Q_PROJ), tensors[Q_PROJ])


def test_code_in_a_bin_file_is_not_run(folder, tmp_path):
    torch.save({"model.norm.weight": Touch(tmp_path / "touched")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PunaError, match=r"pytorch_model\.bin is damaged, or holds more than tensors and is not opened"):
        load(folder)
    assert not (tmp_path / "touched").exists()


def test_a_cut_off_bin_file_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    content = (folder / "pytorch_model.bin").read_bytes()
    for kept in (0, 3, len(content) // 2):
        (folder / "pytorch_model.bin").write_bytes(content[:kept])
        with pytest.raises(PunaError, match=r"pytorch_model\.bin is damaged"):
            load(folder)


def test_load_gives_the_model_and_its_tokenizer(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    model, tokenizer = load(folder)
    assert tokenizer.decode(tokenizer.encode("def f(x):\n    return x")) == "def f(x):\n    return x"
    assert tokenizer.vocab_size == model.config.vocab_size
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [tokenizer.eos_id, tokenizer.infilling.eot_id],
    }


def test_a_longer_context_than_the_files_is_taken_where_attention_has_no_window(folder):
    model, _ = load(folder, context=9000)
    assert model.config.max_position_embeddings == 9000
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "mistral", "sliding_window": 2048}))
    assert load(folder)[0].config.max_position_embeddings == 2048
    with pytest.raises(PunaError, match=r"sliding_window 2048 is shorter than the context \(9000\)"):
        load(folder, context=9000)


def test_a_model_without_an_end_is_saved_without_one(tmp_path):
    save_model(tiny_model(eos_token_id=None), tmp_path / "model")
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": None}  # transformers generates nothing with an empty list


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "ends"),
    [
        (109, [101, 109], (109, 101)),  # as Llama-3-Instruct, whose are 128,009 and 128,001
        (145, [145, 143], (145, 143)),  # as Qwen2.5-Instruct, likewise
        (2, 2, (2,)),  # as Code Llama
        (2, None, (2,)),
        (None, 7, (7,)),
    ],
)
def test_a_models_texts_end_where_its_generation_config_says_too(folder, in_config, in_generation_config, ends):
    edit_json(folder / "config.json", eos_token_id=in_config)
    edit_json(folder / "generation_config.json", eos_token_id=in_generation_config)
    assert load_config(folder).eos_token_ids == load(folder)[0].config.eos_token_ids == ends
    convert(folder, folder.parent / "converted")
    assert load_config(folder.parent / "converted").eos_token_ids == ends


@pytest.mark.parametrize("write", [convert, quantize])
def test_the_id_of_padding_goes_along(folder, write):
    edit_json(folder / "config.json", pad_token_id=7)
    write(folder, folder.with_name("written"))
    assert json.loads((folder.with_name("written") / "config.json").read_text())["pad_token_id"] == 7


@pytest.mark.parametrize("write", [convert, quantize])
def test_other_settings_for_generation_go_along(tmp_path, write):
    folder = write_tiny_model(tmp_path / "model")
    before = json.loads((folder / "generation_config.json").read_text())
    sampling = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1, "pad_token_id": 7}
    edit_json(folder / "generation_config.json", **sampling, _from_model_config=True)
    write(folder, tmp_path / "written")
    assert json.loads((tmp_path / "written/generation_config.json").read_text()) == {**before, **sampling}


def test_a_generation_config_whose_ends_are_no_ids_is_refused(folder):
    edit_json(folder / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(PunaError, match=r"generation_config\.json: eos_token_id is '</s>'; it must be an id"):
        load_config(folder)


def test_a_folder_without_a_tokenizer_loads_without_one(folder):
    assert load(folder)[1] is None


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    save_model(tiny_model(vocab_size=300), tmp_path / "small")
    shutil.copy(folder / "tokenizer.model", tmp_path / "small")
    with pytest.raises(PunaError, match="gives ids up to"):
        load(tmp_path / "small")


def test_a_tokenizer_with_more_ids_than_the_model_is_not_saved_with_it(tmp_path):
    tokenizer = load_tokenizer(write_tiny_model(tmp_path / "model"))
    with pytest.raises(PunaError, match="gives ids up to"):
        save_model(tiny_model(vocab_size=300), tmp_path / "small", tokenizer=tokenizer)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("write", [convert, quantize])
def test_markers_without_embeddings_end_no_text_of_what_is_written(tmp_path, write):
    """The folders of Code Llama 34B and Python: markers were added to the tokenizer, and none to the model."""
    tokenizer = train_tokenizer([Path(__file__).read_text()], tmp_path / "tokenizer", vocab_size=512, infilling=False)
    save_model(tiny_model(vocab_size=512), tmp_path / "model", tokenizer=tokenizer)
    added = {f"{SPACE_MARK}<{name}>": 512 + i for i, name in enumerate(("PRE", "MID", "SUF", "EOT"))}
    (tmp_path / "model/added_tokens.json").write_text(json.dumps(added))
    assert load_tokenizer(tmp_path / "model").infilling.eot_id == 515
    edit_json(tmp_path / "model/generation_config.json", eos_token_id=[2, 515])  # as earlier versions exported it
    write(tmp_path / "model", tmp_path / "written")
    written = json.loads((tmp_path / "written/generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 2}
    model, tokenizer = load(tmp_path / "written")
    assert (tokenizer.vocab_size, tokenizer.infilling, model.config.eos_token_ids) == (512, None, (2,))


def test_nothing_is_overwritten(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(PunaError, match="exists already"):
        save_model(tiny_model(seed=1), folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("puna.checkpoint.weights.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tiny_model(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_loading_takes_the_memory_of_the_model_and_one_tensor(tmp_path, peak_anonymous_bytes):
    model = tiny_model(vocab_size=30_000, hidden_size=256)
    size = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    save_model(model, tmp_path / "model")
    peak = peak_anonymous_bytes(load, tmp_path / "model")
    slack = 8_000_000
    assert size + largest + slack < 2 * size  # a second copy would be seen
    assert 0.9 * size < peak < size + largest + slack


def test_saving_takes_the_memory_of_one_tensor(tmp_path, peak_anonymous_bytes):
    save_model(tiny_model(vocab_size=30_000, hidden_size=256), tmp_path / "model")
    rounded = partial(convert, dtype="bf16")
    peak = peak_anonymous_bytes(rounded, tmp_path / "model", tmp_path / "copy")
    assert peak < 30_000 * 256 * 2 + 8_000_000
    assert {p.dtype for p in load(tmp_path / "copy")[0].parameters()} == {torch.bfloat16}


def test_loading_does_not_import_torchs_compiler(folder):
    code = "import sys; from puna.checkpoint import load; load(sys.argv[1]); print('sympy' in sys.modules)"
    command = [sys.executable, "-c", code, folder]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "False\n"


def test_a_name_that_is_no_folder_says_so(tmp_path):
    with pytest.raises(PunaError, match=r"there is no folder \S+/nothing"):
        resolve(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(PunaError, match="is a file; a model is a folder"):
        resolve(tmp_path / "file")


def test_more_layers_than_there_are_tensors_are_refused_at_once(folder):
    edit_json(folder / "config.json", num_hidden_layers=10**12)
    with pytest.raises(PunaError, match="too few for the 1000000000000 layers"):
        load(folder)


def test_a_path_into_a_folder_that_is_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("exports").mkdir()
    with pytest.raises(PunaError, match="there is no folder exports/mine; name a model's folder"):
        resolve("exports/mine")


def test_a_hub_id_without_the_hubs_client_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PunaError, match=r"no folder codellama/nothing; .* pip install huggingface_hub"):
        resolve("codellama/nothing")


def test_a_hub_that_cannot_be_reached_is_one_clear_message(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("[Errno -3] Temporary failure in name resolution\nlong story")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(PunaError) as caught:
        resolve("codellama/CodeLlama-7b-hf")
    assert "the Hugging Face hub cannot be reached ([Errno -3] Temporary failure in name resolution)" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (
            ["model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth"],
            {"model.safetensors"},
        ),
        (["pytorch_model-00001-of-00001.bin", "optimizer.bin"], {"pytorch_model-00001-of-00001.bin"}),
    ],
)
def test_a_hub_id_gives_the_folder_of_its_download(monkeypatch, tmp_path, files, fetched):
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "download").mkdir()

    def download(name: str, allow_patterns: list[str]) -> str:
        for file in ["config.json", *files]:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / "download" / file).touch()
        return str(tmp_path / "download")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("codellama/tiny") == tmp_path / "download"
    assert {file.name for file in (tmp_path / "download").iterdir()} == {"config.json", *fetched}


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def change(folder: Path, edit: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def saved_config(folder: Path) -> Path:
    save_model(tiny_model(), folder / "other")
    return folder / "other" / "config.json"


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.detach().view(torch.uint8), two.view(torch.uint8))


def all_bit_patterns(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bits, among them infinities, NaNs and subnormals."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
