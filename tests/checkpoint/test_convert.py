"""Meta's checkpoints and ours: the same network, the same bits, and every misfit named."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puna.checkpoint import convert, load, save_model
from puna.checkpoint.formats.meta import CONTEXT_LENGTHS, _params_of, to_halves, to_pairs
from puna.cli import run
from puna.errors import PunaError, UsageError
from puna.model.config import PRESETS
from puna.testing import tiny_model, write_tiny_model

PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": -1,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
}

#: The dim in which Meta's layers cut a weight among ranks, written down from its model.py.
CUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "tok_embeddings": 1, "output": 0}


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """A tiny checkpoint as Meta publishes them, on two ranks."""
    return write_meta(tmp_path / "meta", meta_weights(), ranks=2)


def test_the_logits_are_those_of_metas_interleaved_network(meta, tmp_path):
    model = load(convert(meta, tmp_path / "hf"))[0]
    tokens = torch.randint(160, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, reference = model(tokens), meta_logits(meta_weights(), tokens)
    assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_rows_are_reordered_as_transformers_reorders_them():
    weight = torch.randn(48, 10)
    heads = 6
    theirs = weight.view(heads, 48 // heads // 2, 2, 10).transpose(1, 2).reshape(48, 10)
    assert not torch.equal(theirs, weight)
    assert torch.equal(to_halves(weight, 8), theirs)
    assert torch.equal(to_pairs(theirs, 8), weight)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_meta_to_hugging_face_and_back_is_exact(tmp_path, ranks, dtype):
    weights = {name: values.to(dtype) for name, values in meta_weights().items()}
    weights["norm.weight"][3] = torch.nan  # of which both ranks hold a copy
    source = write_meta(tmp_path / "meta", weights, ranks)
    convert(source, tmp_path / "hf")
    back = convert(tmp_path / "hf", tmp_path / "back", to="meta")
    written = torch.load(back / "consolidated.00.pth", weights_only=True)
    assert written.keys() == weights.keys()
    for name, values in weights.items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name].view(torch.uint8), values.view(torch.uint8)), name
    params = json.loads((back / "params.json").read_text())
    assert {name: params[name] for name in PARAMS} == {**PARAMS, "vocab_size": 160}


def test_hugging_face_to_meta_and_back_is_exact(tmp_path):
    model = tiny_model(max_position_embeddings=16384)
    save_model(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", to="meta")
    back = load(convert(tmp_path / "meta", tmp_path / "back"))[0]
    assert replace(back.config, initializer_range=model.config.initializer_range) == model.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


def test_rotary_tables_in_the_file_are_skipped(tmp_path):
    weights = {**meta_weights(), "rope.freqs": torch.ones(8)}
    assert load(convert(write_meta(tmp_path / "meta", weights, 1), tmp_path / "hf"))[0].config.vocab_size == 160


@pytest.mark.parametrize(("theta", "context"), CONTEXT_LENGTHS.items())
def test_the_context_length_follows_from_theta(tmp_path, theta, context):
    source = write_meta(tmp_path / "meta", meta_weights(), 1, rope_theta=theta)
    config = load(convert(source, tmp_path / "hf"))[0].config
    assert (config.rope_theta, config.max_position_embeddings) == (theta, context)


def test_a_training_run_is_exported_first(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(PunaError, match=r"run is a training run; write its weights with `puna export \S+run -o DIR`"):
        convert(tmp_path / "run", tmp_path / "hf")


def test_a_source_that_is_not_there_may_be_a_file_or_a_folder(tmp_path):
    with pytest.raises(PunaError, match=r"there is no file or folder \S+missing\.ckpt; name a checkpoint's folder, or"):
        convert(tmp_path / "missing.ckpt", tmp_path / "hf")


def test_a_missing_theta_says_how_to_state_it(tmp_path):
    source = write_meta(tmp_path / "meta", meta_weights(), 1, rope_theta=None)
    with pytest.raises(
        PunaError, match=r"params\.json has no rope_theta; .* --rope-theta 10000 .* 1000000 \(Code Llama\)"
    ):
        convert(source, tmp_path / "hf")
    assert load(convert(source, tmp_path / "hf", rope_theta=1e4))[0].config.rope_theta == 1e4


def test_a_theta_against_the_sources_own_is_refused(meta, tmp_path):
    with pytest.raises(PunaError, match="states rope_theta 1e\\+06, not 10000; leave out --rope-theta"):
        convert(meta, tmp_path / "hf", rope_theta=1e4)
    folder = convert(meta, tmp_path / "hf")
    for _ in range(2):
        with pytest.raises(PunaError, match="states rope_theta 1e\\+06, not 10000; leave out --rope-theta"):
            convert(folder, tmp_path / "again", rope_theta=1e4)
        fields = json.loads((folder / "config.json").read_text())  # as transformers spells it since version 5
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta", 1e6)}
        (folder / "config.json").write_text(json.dumps(fields))


def test_a_config_without_theta_takes_the_stated_one(tmp_path):
    save_model(tiny_model(), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_theta"]
    path.write_text(json.dumps(fields))
    with pytest.raises(PunaError, match="rope_theta"):
        convert(tmp_path / "hf", tmp_path / "out")
    assert load(convert(tmp_path / "hf", tmp_path / "out", rope_theta=1e6))[0].config == tiny_model().config


def test_a_vocabulary_against_the_tensors_is_refused(tmp_path):
    source = write_meta(tmp_path / "meta", meta_weights(), 1, vocab_size=150)
    with pytest.raises(PunaError, match="states vocab_size 150, but the embedding has 160 rows"):
        convert(source, tmp_path / "hf")


def test_a_missing_rank_is_named(meta, tmp_path):
    (meta / "consolidated.00.pth").unlink()
    with pytest.raises(PunaError, match=r"consolidated\.00\.pth is missing, but consolidated\.01\.pth is there"):
        convert(meta, tmp_path / "hf")


def test_a_cut_off_rank_is_named(meta, tmp_path):
    file = meta / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(PunaError, match=r"consolidated\.01\.pth is damaged"):
        convert(meta, tmp_path / "hf")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda w: w.update({"layers.0.attention.wq.bias": torch.ones(64)}),
            r"holds layers\.0\.attention\.wq\.bias, which",
        ),
        (lambda w: w.pop("layers.1.ffn_norm.weight"), r"lacks model\.layers\.1\.post_attention_layernorm\.weight"),
        (lambda w: w.pop("tok_embeddings.weight"), r"lacks the tensor that becomes model\.embed_tokens\.weight"),
        (
            lambda w: w.update({"norm.weight": torch.ones(32)}),
            r"model\.norm\.weight has shape \(32,\), .* makes it \(64,\)",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, edit, message):
    weights = meta_weights()
    edit(weights)
    with pytest.raises(PunaError, match=message):
        convert(write_meta(tmp_path / "meta", weights, 1), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_ranks_of_different_models_are_told_apart(meta, tmp_path):
    content = torch.load(meta / "consolidated.01.pth", weights_only=True)
    torch.save({**content, "norm.weight": content["norm.weight"] + 1}, meta / "consolidated.01.pth")
    with pytest.raises(PunaError, match=r"norm\.weight differs between .*00\.pth and .*01\.pth"):
        convert(meta, tmp_path / "hf")
    torch.save({**content, "more": torch.ones(1)}, meta / "consolidated.01.pth")
    with pytest.raises(PunaError, match=r"01\.pth holds more, which the first rank's file lacks"):
        convert(meta, tmp_path / "hf")
    del content["norm.weight"]
    torch.save(content, meta / "consolidated.01.pth")
    with pytest.raises(PunaError, match=r"01\.pth lacks norm\.weight, which the first rank's file holds"):
        convert(meta, tmp_path / "hf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_scaled_rope": True}, "is of Llama 3, .* convert the Hugging Face version"),
        ({"vocab_size": 128_256, "rope_theta": 5e5}, "is of Llama 3, .* convert the Hugging Face version"),
        ({"n_experts": 8}, "has the field 'n_experts', which puna does not know"),
        ({"norm_eps": None}, "lacks norm_eps"),
    ],
)
def test_params_that_puna_does_not_know_are_named(tmp_path, fields, message):
    with pytest.raises(PunaError, match=message):
        convert(write_meta(tmp_path / "meta", meta_weights(), 1, **fields), tmp_path / "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True, "attention_output_bias": True}, "no place for biases"),
        ({"head_dim": 32}, "no place for head_dim 32"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "no place for rope_scaling"),
        ({"model_type": "mistral"}, "no place for model_type 'mistral'"),
    ],
)
def test_what_metas_format_cannot_say_is_refused(tmp_path, changes, message):
    save_model(tiny_model(**changes), tmp_path / "hf")
    with pytest.raises(PunaError, match=message):
        convert(tmp_path / "hf", tmp_path / "meta", to="meta")
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize(
    "config",
    [*PRESETS.values(), replace(PRESETS["tiny-64"], intermediate_size=177)],
    ids=lambda config: f"{config.hidden_size}-{config.intermediate_size}",
)
def test_metas_code_finds_the_feed_forward_width_in_what_we_write(config):
    params = _params_of(config)
    width = int(2 * 4 * params["dim"] / 3)  # as llama/model.py computes it
    if "ffn_dim_multiplier" in params:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple = params["multiple_of"]
    assert multiple * ((width + multiple - 1) // multiple) == config.intermediate_size


def test_the_tokenizer_goes_along_also_from_the_folder_above(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    vocabulary = (folder / "tokenizer.model").read_bytes()
    meta = convert(folder, tmp_path / "llama" / "7B", to="meta")
    assert (meta / "tokenizer.model").read_bytes() == vocabulary
    assert (meta / "chat_template.jinja").is_file()
    (meta / "tokenizer.model").rename(meta.parent / "tokenizer.model")
    model, tokenizer = load(convert(meta, tmp_path / "back"))
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == vocabulary
    assert model.config.bos_token_id == tokenizer.bos_id
    assert model.config.eos_token_ids == (tokenizer.eos_id, tokenizer.infilling.eot_id)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id


def test_a_bin_folder_becomes_safetensors(tmp_path, capsys):
    model = tiny_model()
    save_model(model, tmp_path / "hf")
    torch.save(dict(model.named_parameters()), tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    convert(tmp_path / "hf", tmp_path / "out", dtype="bf16")
    assert "hf has no tokenizer; copy tokenizer.model or tokenizer.json to" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.bin"))
    converted = load(tmp_path / "out")[0]
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(converted.parameters(), model.parameters(), strict=True))


def test_a_folder_in_no_known_format_says_what_it_holds(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights.gguf").touch()
    with pytest.raises(PunaError, match=r"is in no format that is known \(hf, meta.*\); it holds weights\.gguf"):
        convert(tmp_path / "source", tmp_path / "out")


def test_an_unknown_target_lists_those_there_are(meta, tmp_path):
    with pytest.raises(UsageError, match=r"no format is called 'gguf'; there are hf, meta"):
        convert(meta, tmp_path / "out", to="gguf")


def test_what_exists_is_not_touched(meta):
    with pytest.raises(PunaError, match="exists already"):
        convert(meta, meta)


def test_converting_takes_the_memory_of_few_tensors(tmp_path, peak_anonymous_bytes):
    size = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 2048, "num_hidden_layers": 16}
    model = tiny_model(**size)
    weights = sum(values.nbytes for values in model.parameters())
    save_model(model, tmp_path / "hf")
    slack = 20_000_000
    assert weights > 4 * slack
    assert peak_anonymous_bytes(partial(convert, to="meta"), tmp_path / "hf", tmp_path / "meta") < slack
    assert peak_anonymous_bytes(convert, tmp_path / "meta", tmp_path / "back") < slack


def test_the_command_prints_the_folder(meta, tmp_path, capsys):
    assert run(["convert", str(meta), "-o", str(tmp_path / "hf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path / "hf")}
    assert run(["convert", str(meta), "-o", str(tmp_path / "new"), "--to", "gguf"]) == 2


def meta_weights() -> dict[str, Tensor]:
    """Random weights of the shape of `PARAMS`, vocabulary 160, feed-forward width 96, under Meta's names."""
    shapes = {"tok_embeddings": (160, 64)}
    for n in range(2):
        for name, shape in {"wq": (64, 64), "wk": (32, 64), "wv": (32, 64), "wo": (64, 64)}.items():
            shapes[f"layers.{n}.attention.{name}"] = shape
        for name, shape in {"w1": (96, 64), "w2": (64, 96), "w3": (96, 64)}.items():
            shapes[f"layers.{n}.feed_forward.{name}"] = shape
        shapes |= {f"layers.{n}.attention_norm": (64,), f"layers.{n}.ffn_norm": (64,)}
    shapes |= {"norm": (64,), "output": (160, 64)}
    generator = torch.Generator().manual_seed(3)
    return {f"{name}.weight": torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}


def write_meta(folder: Path, weights: dict[str, Tensor], ranks: int, cut: dict[str, int] = CUT, **fields) -> Path:
    """Writes weights as Meta does; a field that is None is left out of `params.json`."""
    folder.mkdir(parents=True)
    params = {name: value for name, value in {**PARAMS, **fields}.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(ranks):
        slices = {}
        for name, values in weights.items():
            dim = cut.get(name.split(".")[-2])
            slices[name] = values if dim is None or values.dim() < 2 else values.chunk(ranks, dim)[rank].clone()
        torch.save(slices, folder / f"consolidated.{rank:02d}.pth")
    return folder


def meta_logits(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Meta's network as its model.py has it: neighbouring channels are a complex number that its position turns."""
    length, width = tokens.shape[1], 16
    turns = torch.outer(torch.arange(length), PARAMS["rope_theta"] ** -(torch.arange(0, width, 2) / width))
    turns = torch.polar(torch.ones_like(turns), turns)[:, None]
    mask = torch.full((length, length), float("-inf")).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + PARAMS["norm_eps"]) * weights[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)

    x = weights["tok_embeddings.weight"][tokens]
    for n in range(2):
        w = {name.split(".")[-2]: values for name, values in weights.items() if name.startswith(f"layers.{n}.")}
        h = norm(x, f"layers.{n}.attention_norm")
        q, k, v = ((h @ w[name].T).unflatten(-1, (-1, width)) for name in ("wq", "wk", "wv"))
        q, k = turned(q), turned(k)
        k, v = (y.repeat_interleave(2, dim=2) for y in (k, v))
        scores = torch.einsum("bqnh,bsnh->bnqs", q, k) / width**0.5 + mask
        x = x + torch.einsum("bnqs,bsnh->bqnh", scores.softmax(-1), v).flatten(-2) @ w["wo"].T
        h = norm(x, f"layers.{n}.ffn_norm")
        x = x + (torch.nn.functional.silu(h @ w["w1"].T) * (h @ w["w3"].T)) @ w["w2"].T
    return norm(x, "norm") @ weights["output.weight"].T
