"""Checkpoints of MindFormers: the same model, whole or in slices, and every misfit named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from puna.checkpoint import convert, load, save_model
from puna.checkpoint.formats.mindspore.ckpt import open_ckpt, write_ckpt
from puna.checkpoint.formats.mindspore.model_config import from_fields
from puna.checkpoint.formats.mindspore.strategy import Layout, read_strategies, write_strategy
from puna.checkpoint.tensors import StoredTensor, open_safetensors
from puna.checkpoint.weights import open_weights
from puna.cli import run
from puna.errors import PunaError, UsageError
from puna.model.config import preset
from puna.testing import tiny_model, write_tiny_model

#: The fields of MindFormers' YAML that describe the model of the fixtures.
FIELDS = {
    "type": "LlamaConfig", "seq_length": 128, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2,
    "intermediate_size": 176, "vocab_size": 512, "rms_norm_eps": 1e-5, "theta": 1000000.0, "extend_method": "None",
}  # fmt: skip


@pytest.fixture
def fixtures(shared: Path) -> Path:
    return shared / "fixtures/mindspore"


@pytest.fixture
def model_ckpt(tmp_path: Path) -> Path:
    """A tiny random model as `model.ckpt`, alone in its folder: nothing says its rotary base."""
    save_model(tiny_model(), tmp_path / "first")
    folder = convert(tmp_path / "first", tmp_path / "ms", to="mindspore")
    (folder / "model.yaml").unlink()
    return folder / "model.ckpt"


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_weights_are_those_of_the_hugging_face_model_bit_for_bit(fixtures, tmp_path, kind):
    folder = convert(fixtures / f"ckpt/tiny_llama_{kind}.ckpt", tmp_path / "hf", rope_theta=1e6)
    weights = np.load(fixtures / "ckpt/tiny_llama_hf_fp32.npz")
    ours = open_weights(folder)
    assert set(ours) == set(weights.files)
    for name, stored in ours.items():
        assert torch.equal(stored.read(), torch.from_numpy(weights[name]).to(stored.dtype)), name


def test_logits_are_those_of_mindformers(fixtures, tmp_path):
    model = load(convert(fixtures / "ckpt/tiny_llama_fp32.ckpt", tmp_path / "hf", rope_theta=1e6))[0]
    reference = np.load(fixtures / "reference/logits_fp32.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(reference["ids"]).long())
    np.testing.assert_allclose(logits.numpy(), reference["logits"], atol=1e-5)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_back_to_mindspore_gives_the_same_bytes(fixtures, tmp_path, kind):
    source = fixtures / f"ckpt/tiny_llama_{kind}.ckpt"
    convert(source, tmp_path / "hf", rope_theta=1e6)
    back = convert(tmp_path / "hf", tmp_path / "back", to="mindspore")
    assert (back / "model.ckpt").read_bytes() == source.read_bytes()
    assert load(convert(back, tmp_path / "again"))[0].config == load(tmp_path / "hf")[0].config


@pytest.mark.parametrize(("slices", "whole"), [("mp2pp2_fp16", "fp16"), ("dp2mp2_optshard_bf16", "bf16")])
def test_slices_are_merged_to_the_exact_model(fixtures, tmp_path, slices, whole):
    convert(fixtures / f"distributed/{slices}", tmp_path / "merged", rope_theta=1e6)
    convert(fixtures / f"ckpt/tiny_llama_{whole}.ckpt", tmp_path / "whole", rope_theta=1e6)
    merged, expected = (tmp_path / place / "model.safetensors" for place in ("merged", "whole"))
    assert merged.read_bytes() == expected.read_bytes()


def test_a_merged_strategy_file_does_as_well(fixtures, tmp_path):
    source = fixtures / "distributed/mp2pp2_fp16"
    by_folder = convert(source, tmp_path / "a", rope_theta=1e6)
    merged = source / "strategy/merged_ckpt_strategy.ckpt"
    by_file = convert(source, tmp_path / "b", rope_theta=1e6, strategy=merged)
    assert (by_file / "model.safetensors").read_bytes() == (by_folder / "model.safetensors").read_bytes()


def test_one_slice_of_several_is_refused_with_what_to_name(fixtures, tmp_path):
    with pytest.raises(PunaError, match=r"makes vocab_size 512, .* make it 256; of slices, name the folder that holds"):
        convert(fixtures / "distributed/mp2pp2_fp16/rank_0", tmp_path / "out", config="tiny-64")


def test_weights_without_rows_are_refused(model_ckpt, tmp_path):
    content = open_ckpt(model_ckpt)
    content["model.tok_embeddings.embedding_weight"] = StoredTensor.of(torch.zeros(0, 64))
    write_ckpt(tmp_path / "empty.ckpt", content)
    with pytest.raises(PunaError, match=r"makes vocab_size 512, .* make it 0$"):
        convert(tmp_path / "empty.ckpt", tmp_path / "out", config="tiny-64")


def test_of_several_tokens_that_end_a_text_the_one_of_config_json_goes_along(tmp_path, capsys):
    folder = write_tiny_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    section = yaml.safe_load((convert(folder, tmp_path / "ms", to="mindspore") / "model.yaml").read_text())
    assert section["model"]["model_config"]["eos_token_id"] == 2
    assert "ends texts at 2 alone, not at 7, 9 too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("slices", "whole", "layout"),
    [
        ("mp2pp2_fp16", "fp16", "mp=2,pp=2"),
        ("mp2pp2_fp16", "fp16", "strategy"),
        ("dp2mp2_optshard_bf16", "bf16", "strategy"),
    ],
)
def test_slices_are_cut_as_mindspores_own_tool_cuts_them(fixtures, tmp_path, slices, whole, layout):
    theirs = fixtures / f"distributed/{slices}"
    convert(fixtures / f"ckpt/tiny_llama_{whole}.ckpt", tmp_path / "hf", rope_theta=1e6)
    layout = str(theirs / "strategy") if layout == "strategy" else layout
    ours = convert(tmp_path / "hf", tmp_path / "slices", to="mindspore", layout=layout)
    for rank in range(4):
        name = f"rank_{rank}/checkpoint_{rank}.ckpt"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.parametrize("layout", ["dp=2,mp=2,pp=2", "dp=2,mp=1,optimizer=1", "dp=2,mp=2,optimizer=1", "dp=4", "pp=2"])
def test_what_is_cut_is_merged_again(tmp_path, layout):
    save_model(tiny_model(initializer_range=0.02), tmp_path / "hf")  # which MindFormers does not keep
    slices = convert(tmp_path / "hf", tmp_path / "slices", to="mindspore", layout=layout)
    merged = convert(slices, tmp_path / "merged")
    assert (merged / "model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()
    assert (merged / "config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()


def test_the_optimizer_is_sharded_by_the_axes_that_hold_copies():
    """The layouts of MindSpore's own files, place by place."""
    embedding = Layout((4,), ((), ()), 4)
    assert (embedding.parts(), [embedding.place(rank)[0] for rank in range(4)]) == ([4, 1], [0, 1, 2, 3])
    wq = Layout((2, 1, 2), ((0,), (1,)), 2)
    assert (wq.parts(), [wq.place(rank)[0] for rank in range(4)]) == ([4, 1], [0, 2, 1, 3])
    wo = Layout((2, 2, 1), ((0,), (1,)), 2)
    assert [wo.place(rank) for rank in range(4)] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    everything = Layout((2, 2, 1), ((), (1,)), -1)
    assert (everything.parts(), [everything.place(rank) for rank in range(4)]) == (
        [2, 2], [[0, 0], [0, 1], [1, 0], [1, 1]],
    )  # fmt: skip


def test_strategy_files_are_written_as_they_are_read(fixtures, tmp_path):
    for folder in ("mp2pp2_fp16", "dp2mp2_optshard_bf16"):
        for file in sorted((fixtures / "distributed" / folder / "strategy").glob("*rank*.ckpt")):
            ((stage, layouts),) = read_strategies(file).items()
            write_strategy(tmp_path / "again.ckpt", stage, layouts)
            assert (tmp_path / "again.ckpt").read_bytes() == file.read_bytes()


def test_the_json_form_says_the_same(fixtures, tmp_path):
    folder = fixtures / "distributed/dp2mp2_optshard_bf16/strategy"
    ((stage, layouts),) = read_strategies(folder).items()
    items = {
        name: {"dev_matrix": list(x.device_matrix), "tensor_map": [(axes or (-1,))[0] for axes in x.tensor_map],
               "field": 0, "opt_weight_shard_size": x.optimizer_shards, "opt_weight_shard_step": 0}
        for name, x in layouts.items()
    }  # fmt: skip
    content = {
        "current_stage": stage,
        "parallel_strategy_item": {"op": {"stage": stage}},
        "parallel_layout_item": items,
    }
    (tmp_path / "strategy.json").write_text(json.dumps(content))
    assert read_strategies(tmp_path / "strategy.json") == {stage: layouts}


def test_weights_that_lie_together_are_taken_apart(fixtures, tmp_path):
    content = open_ckpt(fixtures / "ckpt/tiny_llama_fp32.ckpt")
    order = np.load(fixtures / "reference/qkv_concat_permutation.npz")
    together = {}
    for name, value in content.items():
        owner, _, part = name.removesuffix(".weight").rpartition(".")
        if part in ("wq", "w1"):
            parts = {"wq": ("wq", "wk", "wv"), "w1": ("w1", "w3")}[part]
            joined = torch.cat([content[f"{owner}.{p}.weight"].read() for p in parts])
            key, target = {"wq": ("qkv", "w_qkv"), "w1": ("gate_hidden", "w_gate_hidden")}[part]
            rows = next(order[k] for k in order.files if key in k or (key == "gate_hidden" and "ffn" in k))
            together[f"{owner}.{target}.weight"] = StoredTensor.of(joined[torch.from_numpy(rows).long()])
        elif part not in ("wk", "wv", "w3"):
            together[name] = value
    write_ckpt(tmp_path / "concat.ckpt", together)
    convert(tmp_path / "concat.ckpt", tmp_path / "a", rope_theta=1e6)
    convert(fixtures / "ckpt/tiny_llama_fp32.ckpt", tmp_path / "b", rope_theta=1e6)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_optimizer_state_and_counters_are_left_out_with_a_word(model_ckpt, tmp_path, capsys):
    content = open_ckpt(model_ckpt)
    state = {f"adam_{m}.{name}": value for m in "mv" for name, value in content.items()}
    counters = {"global_step": StoredTensor.of(torch.tensor([7], dtype=torch.int32)), "note": "hello"}
    write_ckpt(tmp_path / "run.ckpt", {**content, **counters, **state})
    convert(tmp_path / "run.ckpt", tmp_path / "hf", rope_theta=1e6)
    said = f"left out of the model: {2 * len(content)} tensors of optimizer state, global_step, note"
    assert said in capsys.readouterr().err
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


def test_safetensors_of_mindspore_are_read(model_ckpt, tmp_path):
    from safetensors.torch import save_file

    tensors = {name: value.read() for name, value in open_ckpt(model_ckpt).items()}
    (tmp_path / "st").mkdir()
    save_file(tensors, tmp_path / "st/model.safetensors", metadata={"format": "ms"})
    for source in (tmp_path / "st", tmp_path / "st/model.safetensors"):
        folder = convert(source, tmp_path / f"hf-{source.name}", rope_theta=1e6)
        assert (folder / "model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


@pytest.mark.parametrize("is_flat", [False, True])
def test_several_safetensors_with_their_map_are_read(model_ckpt, tmp_path, is_flat):
    """As `mindspore.unified_safetensors` leaves them, and, with a flat map, MindFormers."""
    from safetensors.torch import save_file

    tensors = {name: value.read() for name, value in open_ckpt(model_ckpt).items()}
    (tmp_path / "st").mkdir()
    places = {name: f"part{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        own = {name: values for name, values in tensors.items() if places[name] == file}
        save_file(own, tmp_path / "st" / file, metadata=None if is_flat else {"format": "ms"})
    content = places if is_flat else {"metadata": {}, "weight_map": places}
    (tmp_path / "st/param_name_map.json").write_text(json.dumps(content))
    folder = convert(tmp_path / "st", tmp_path / "hf", rope_theta=1e6)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


def test_a_map_that_names_no_files_is_said(tmp_path):
    (tmp_path / "param_name_map.json").write_text('{"metadata": {}}')
    with pytest.raises(PunaError, match=r'param_name_map\.json has no "weight_map"'):
        convert(tmp_path, tmp_path / "hf", rope_theta=1e6)


def test_slices_saved_as_safetensors_are_merged(tmp_path):
    from safetensors.torch import save_file

    save_model(tiny_model(), tmp_path / "hf")
    slices = convert(tmp_path / "hf", tmp_path / "slices", to="mindspore", layout="mp=2,pp=2")
    for file in slices.glob("rank_*/*.ckpt"):
        tensors = {name: value.read() for name, value in open_ckpt(file).items()}
        save_file(tensors, file.with_suffix(".safetensors"), metadata={"format": "ms"})
        file.unlink()
    merged = convert(slices, tmp_path / "merged")
    assert (merged / "model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_two_tensors_that_mindspore_saved_as_safetensors(fixtures, tmp_path):
    whole = open_ckpt(fixtures / "ckpt/tiny_llama_fp32.ckpt")
    for name, stored in open_safetensors(fixtures / "ckpt/two_tensors.safetensors").items():
        assert torch.equal(stored.read(), whole[name].read().to(stored.dtype))
    with pytest.raises(PunaError, match=r"two_tensors\.safetensors holds no weights of layer|lacks model\.tok_emb"):
        convert(fixtures / "ckpt/two_tensors.safetensors", tmp_path / "hf", rope_theta=1e6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.attention.wx.weight": (2, 2)}, r"holds model\.layers\.0\.attention\.wx\.weight, which"),
        ({"model.layers.1.attention.wq.mindpet_delta_lora_a": (2, 2)}, "of a LoRA adapter; merge it"),
        ({"model.layers.1.ffn_norm.weight": None}, r"lacks model\.layers\.1\.post_attention_layernorm\.weight"),
        ({"model.tok_embeddings.embedding_weight": None}, r"lacks model\.tok_embeddings\.embedding_weight"),
        ({"model.layers.0.feed_forward.w2.weight": (64, 7)}, r"down_proj\.weight has shape \(64, 7\)"),
        ({"lm_head.weight": None}, r"lacks lm_head\.weight"),
    ],
)
def test_a_name_or_shape_that_does_not_fit_is_an_error(model_ckpt, tmp_path, change, message):
    content = open_ckpt(model_ckpt)
    for name, shape in change.items():
        content.pop(name, None)
        if shape is not None:
            content[name] = StoredTensor.of(torch.zeros(shape))
    write_ckpt(tmp_path / "x.ckpt", content)
    with pytest.raises(PunaError, match=message):
        convert(tmp_path / "x.ckpt", tmp_path / "hf", rope_theta=1e6)
    assert not (tmp_path / "hf").exists()


def test_what_nothing_states_must_be_given(model_ckpt, tmp_path):
    with pytest.raises(PunaError, match=r"does not state the rotary base; .* --config tiny-64.* --rope-theta 1000000"):
        convert(model_ckpt, tmp_path / "hf")
    config = load(convert(model_ckpt, tmp_path / "named", config="tiny-64"))[0].config
    assert config == replace(preset("tiny-64"), initializer_range=config.initializer_range)
    (tmp_path / "mf.yaml").write_text(yaml.safe_dump({"model": {"model_config": FIELDS}}))
    stated = load(convert(model_ckpt, tmp_path / "yaml", config=tmp_path / "mf.yaml"))[0].config
    assert (stated.rope_theta, stated.num_attention_heads, stated.max_position_embeddings) == (1e6, 4, 2048)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"model": {"model_config": {**FIELDS, "num_layers": 3}}}))
    with pytest.raises(PunaError, match=r"bad\.yaml makes num_hidden_layers 3, but the weights .* make it 2"):
        convert(model_ckpt, tmp_path / "no", config=tmp_path / "bad.yaml")
    with pytest.raises(PunaError, match=r"neither a YAML of MindFormers, a config\.json"):
        convert(model_ckpt, tmp_path / "no", config="codellama-35b")
    with pytest.raises(PunaError, match=r"mine\.json does not exist"):
        convert(model_ckpt, tmp_path / "no", config=tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(PunaError, match=r"mine\.json must be called config\.json"):
        convert(model_ckpt, tmp_path / "no", config=tmp_path / "mine.json")


def test_a_size_without_a_name_needs_a_config(tmp_path):
    save_model(tiny_model(intermediate_size=200), tmp_path / "hf")
    folder = convert(tmp_path / "hf", tmp_path / "ms", to="mindspore")
    assert load(convert(folder, tmp_path / "back"))[0].config.intermediate_size == 200
    (folder / "model.yaml").unlink()
    with pytest.raises(PunaError, match="has other sizes than all presets"):
        convert(folder, tmp_path / "no", rope_theta=1e6)


def test_yaml_that_extends_the_context():
    assert from_fields({**FIELDS, "extend_method": "NTK", "scaling_factor": 2.0}, "x").rope_theta == 2e6
    scaled = from_fields({**FIELDS, "extend_method": "PI", "scaling_factor": 4.0}, "x")
    assert scaled.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(PunaError, match="extend_method 'YARN' is not supported, only None, PI and NTK"):
        from_fields({**FIELDS, "extend_method": "YARN"}, "x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", "many"),
        ("num_heads", 0),
        ("hidden_size", []),
        ("theta", None),
        ("multiple_of", 0),
        ("num_heads", 7),
    ],
)
def test_values_that_no_model_has_are_said(field, value):
    fields = {**FIELDS, field: value}
    del fields["intermediate_size"]
    with pytest.raises(PunaError, match=r"a value of model\.model_config|is not divisible by num_attention_heads"):
        from_fields(fields, "x")


def test_the_feed_forward_width_of_code_llama_34b_follows_from_its_yaml():
    fields = {"hidden_size": 8192, "num_layers": 48, "num_heads": 64, "n_kv_heads": 8, "multiple_of": 256,
              "theta": 1e6, "seq_length": 4096}  # fmt: skip
    assert from_fields(fields, "x") == preset("codellama-34b")


def test_of_several_checkpoints_the_latest_that_all_ranks_have_is_taken(fixtures, tmp_path, capsys):
    source = fixtures / "distributed/mp2pp2_fp16"
    shutil.copytree(source / "strategy", tmp_path / "output/strategy")
    for rank in range(4):
        folder = tmp_path / f"output/checkpoint/rank_{rank}"
        folder.mkdir(parents=True)
        for step in ("1_9", "1_10", *(["2_3"] if rank != 3 else [])):
            shutil.copyfile(source / f"rank_{rank}/checkpoint_{rank}.ckpt", folder / f"llama_rank_{rank}-{step}.ckpt")
        (folder / "llama-1_9.txt").touch()
    convert(tmp_path / "output/checkpoint", tmp_path / "a", rope_theta=1e6)
    assert "llama_rank_0-1_10.ckpt is taken" in capsys.readouterr().err
    convert(tmp_path / "output/checkpoint", tmp_path / "b", rope_theta=1e6, pick="*-1_9.ckpt")
    assert "llama_rank_0-1_9.ckpt is taken" in capsys.readouterr().err
    with pytest.raises(PunaError, match=r"rank_3 holds no \*-2_3\.ckpt"):
        convert(tmp_path / "output/checkpoint", tmp_path / "c", rope_theta=1e6, pick="*-2_3.ckpt")
    for name in ("a.ckpt", "b.ckpt"):
        shutil.copyfile(source / "rank_1/checkpoint_1.ckpt", tmp_path / "output/checkpoint/rank_1" / name)
    with pytest.raises(PunaError, match=r"rank_1 holds 5 checkpoints .*choose by --pick"):
        convert(tmp_path / "output/checkpoint", tmp_path / "d", rope_theta=1e6)


def test_copies_that_were_saved_once_are_taken_from_whoever_has_them(tmp_path):
    """As `remove_redundancy` saves them."""
    save_model(tiny_model(), tmp_path / "hf")
    slices = convert(tmp_path / "hf", tmp_path / "slices", to="mindspore", layout="dp=2,mp=2")
    lost = "model.layers.0.attention.wq.weight"
    _edit(slices / "rank_2/checkpoint_2.ckpt", lambda content: content.pop(lost))
    _edit(slices / "rank_1/checkpoint_1.ckpt", lambda content: content.pop("model.norm_out.weight"))
    merged = convert(slices, tmp_path / "merged")
    assert (merged / "model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()
    _edit(slices / "rank_0/checkpoint_0.ckpt", lambda content: content.pop(lost))
    with pytest.raises(PunaError, match=r"rank_0 lacks model\.layers\.0\.attention\.wq\.weight, and no other rank"):
        convert(slices, tmp_path / "no")


def test_slices_that_do_not_fit_together_are_told(fixtures, tmp_path):
    source = tmp_path / "slices"
    shutil.copytree(fixtures / "distributed/mp2pp2_fp16", source)
    broken = tmp_path / "broken"

    def after(change, message):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(source, broken)
        change()
        with pytest.raises(PunaError, match=message):
            convert(broken, tmp_path / "hf", rope_theta=1e6)

    after(lambda: shutil.rmtree(broken / "rank_3"), "lacks rank_3; its strategy is for ranks 0 to 3")
    after(lambda: shutil.rmtree(broken / "strategy"), "give the strategy files with --strategy")
    after(lambda: (broken / "rank_1/checkpoint_1.ckpt").unlink(), "rank_1 holds no checkpoint")
    rank_3 = broken / "rank_3/checkpoint_3.ckpt"
    after(lambda: _edit(rank_3, lambda x: x.pop("lm_head.weight")), r"rank_3 lacks lm_head\.weight")
    more = {"model.layers.1.attention.wq.weight": StoredTensor.of(torch.zeros(3, 64, dtype=torch.float16))}
    after(lambda: _edit(rank_3, lambda x: x.update(more)), r"wq\.weight is \(3, 64\) torch\.float16, not \(32, 64\)")
    norm = {"model.norm_out.weight": StoredTensor.of(torch.zeros(64, dtype=torch.float16))}
    after(lambda: _edit(rank_3, lambda x: x.update(norm)), r"norm_out\.weight differs between")
    last = broken / "strategy/merged_ckpt_strategy.ckpt"
    after(
        lambda: [x.unlink() for x in last.parent.glob("*_[23].ckpt")] and last.unlink(),
        "holds rank_2, which",
    )


def _edit(path, change):
    content = dict(open_ckpt(path))
    change(content)
    path.unlink()
    write_ckpt(path, content)


@pytest.mark.parametrize(
    "layout",
    [
        {"dev_matrix": ["a"], "tensor_map": [0]},
        {"dev_matrix": [1e400], "tensor_map": [0]},
        {"dev_matrix": [], "tensor_map": [0]},
        {"dev_matrix": [2], "tensor_map": [5]},
        {"dev_matrix": [2], "tensor_map": 0},
        {"dev_matrix": [1 << 30, 2], "tensor_map": [0]},
        {"dev_matrix": [2], "tensor_map": [-1], "opt_weight_shard_size": 3},
        {"dev_matrix": [2], "tensor_map": [0], "param_split_shape": [3, 5]},
        {},
    ],
)
def test_layouts_that_cannot_be_are_refused(tmp_path, layout):
    (tmp_path / "s.json").write_text(json.dumps({"parallel_layout_item": {"w": layout}}))
    with pytest.raises(PunaError, match=r"s\.json is no strategy file of MindSpore, or damaged"):
        read_strategies(tmp_path / "s.json")


def test_damaged_strategy_files_are_named(fixtures, tmp_path):
    data = (fixtures / "distributed/mp2pp2_fp16/strategy/ckpt_strategy_rank_0.ckpt").read_bytes()
    path = tmp_path / "s.ckpt"
    generator = np.random.default_rng(0)
    for _ in range(400):
        broken = bytearray(data[: generator.integers(1, len(data) + 1)])
        for place in generator.integers(0, len(broken), 3):
            broken[place] = generator.integers(256)
        path.write_bytes(broken)
        try:
            for layouts in read_strategies(path).values():
                assert all(min(layout.parts(), default=1) >= 1 for layout in layouts.values())
        except PunaError as error:
            assert "s.ckpt" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        ("pp=3", UsageError, "pp=3 must divide the 2 layers"),
        ("mp=3", PunaError, "cannot be cut into 3 equal parts"),
        ("tp=2", UsageError, "'tp=2' is not one of dp=N, mp=N, pp=N"),
        ("mp=0", UsageError, "mp must be 1 or more"),
        ("dp=99999999,mp=2", UsageError, "199,999,998 ranks a stage, .* more than 512 rows; use 512 ranks or less"),
        ("gone", UsageError, "'gone' is neither numbers, as dp=1,mp=8,pp=2, nor strategy files"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(tmp_path, layout, error, message):
    save_model(tiny_model(), tmp_path / "hf")
    with pytest.raises(error, match=message):
        convert(tmp_path / "hf", tmp_path / "ms", to="mindspore", layout=layout)
    assert not (tmp_path / "ms").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True, "attention_output_bias": True}, "no place for biases"),
        ({"head_dim": 32}, "no place for head_dim 32"),
        ({"model_type": "mistral"}, "no place for model_type 'mistral'"),
        ({"tie_word_embeddings": True}, "no place for a head tied to the embedding"),
    ],
)
def test_what_mindformers_cannot_say_is_refused(tmp_path, changes, message):
    save_model(tiny_model(**changes), tmp_path / "hf")
    with pytest.raises(PunaError, match=message):
        convert(tmp_path / "hf", tmp_path / "ms", to="mindspore")


def test_an_option_that_neither_side_takes_is_refused(tmp_path):
    save_model(tiny_model(), tmp_path / "hf")
    with pytest.raises(UsageError, match="layout is no option of reading hf or writing meta"):
        convert(tmp_path / "hf", tmp_path / "meta", to="meta", layout="mp=2")


def test_the_tokenizer_goes_along_with_the_layout_of_dialogs(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    back = convert(convert(folder, tmp_path / "ms", to="mindspore"), tmp_path / "back")
    for name in ("tokenizer.model", "chat_template.jinja"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()


def test_the_command_takes_its_options(model_ckpt, tmp_path, capsys):
    assert run(["convert", str(model_ckpt), "-o", str(tmp_path / "hf"), "--config", "tiny-64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path / "hf")}
    assert (
        run(["convert", str(tmp_path / "hf"), "-o", str(tmp_path / "s"), "--to", "mindspore", "--layout", "mp=2"]) == 0
    )
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["model.yaml", "rank_0", "rank_1", "strategy"]


def test_converting_takes_the_memory_of_a_piece(tmp_path, peak_anonymous_bytes):
    """A model one tensor of which is larger than what converting may take."""
    size = {"vocab_size": 100_000, "hidden_size": 128, "head_dim": 32, "num_hidden_layers": 1}
    model = tiny_model(**size)
    save_model(model, tmp_path / "hf")
    assert model.lm_head.weight.nbytes == 51_200_000
    assert peak_anonymous_bytes(_to_mindspore, tmp_path / "hf", tmp_path / "ms") < 20_000_000
    assert peak_anonymous_bytes(convert, tmp_path / "ms", tmp_path / "back") < 35_000_000
    assert peak_anonymous_bytes(_to_half, tmp_path / "back", tmp_path / "half") < 30_000_000


def _to_half(source: Path, output: Path) -> None:
    convert(source, output, to="mindspore", dtype="fp16")


def _to_mindspore(source: Path, output: Path) -> None:
    convert(source, output, to="mindspore")
