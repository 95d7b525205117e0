"""Shapes of models: the table of presets against the published facts, and what a config.json may not say."""

import pytest

from puna.errors import PunaError
from puna.model.config import PRESETS, ModelConfig, preset

#: Code Llama's published dimensions: dim, layers, heads, kv heads, ffn.
SIZES = {
    "7b": (4096, 32, 32, 32, 11008),
    "13b": (5120, 40, 40, 40, 13824),
    "34b": (8192, 48, 64, 8, 22016),
    "70b": (8192, 80, 64, 8, 28672),
}
#: Preset -> vocabulary, rope theta, positions.
KINDS = {
    "codellama-7b": (32016, 1e6, 16384),
    "codellama-7b-python": (32000, 1e6, 16384),
    "codellama-7b-instruct": (32016, 1e6, 16384),
    "codellama-13b": (32016, 1e6, 16384),
    "codellama-13b-python": (32000, 1e6, 16384),
    "codellama-13b-instruct": (32016, 1e6, 16384),
    "codellama-34b": (32000, 1e6, 16384),
    "codellama-34b-python": (32000, 1e6, 16384),
    "codellama-34b-instruct": (32000, 1e6, 16384),
    "codellama-70b": (32016, 1e6, 16384),
    "codellama-70b-python": (32016, 1e4, 4096),
    "codellama-70b-instruct": (32016, 1e4, 4096),
}

FIELDS = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 256,
}


def test_there_is_a_preset_for_every_code_llama_and_a_tiny_family() -> None:
    assert {name for name in PRESETS if name.startswith("codellama")} == set(KINDS)
    assert [name for name in PRESETS if not name.startswith("codellama")] == [
        "tiny-64",
        "tiny-128",
        "tiny-256",
        "tiny-512",
    ]


@pytest.mark.parametrize("name", KINDS)
def test_presets_have_the_published_shapes(name: str) -> None:
    config = preset(name)
    dim, layers, heads, kv_heads, ffn = SIZES[name.split("-")[1]]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (dim, layers, heads)
    assert (config.num_key_value_heads, config.intermediate_size, config.head_dim) == (kv_heads, ffn, 128)
    assert (config.vocab_size, config.rope_theta, config.max_position_embeddings) == KINDS[name]
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.rope_scaling) == (1e-5, False, None)
    assert (config.bos_token_id, config.eos_token_id, config.model_type) == (1, 2, "llama")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("codellama-7b", 6_738_546_688),
        ("codellama-7b-python", 6_738_415_616),
        ("codellama-13b", 13_016_028_160),
        ("codellama-34b", 33_743_970_304),
        ("codellama-70b", 68_976_910_336),
    ],
)
def test_presets_have_the_published_number_of_weights(name: str, count: int) -> None:
    assert preset(name).parameter_count == count


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(PunaError, match="no preset is called 'codellama-8b'; there are codellama-7b, "):
        preset("codellama-8b")


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_its_json(name: str) -> None:
    assert ModelConfig.from_json(preset(name).to_json()) == preset(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": None}, 'here.json has no "rope_theta"; write down .*\\(1000000 for Code Llama'),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported, only default"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding_window 128 is shorter than the context \\(256\\)"),
        (
            {"model_type": "mistral", "max_position_embeddings": 8192},  # its family's window, where none is named
            "sliding_window 4096 is shorter than the context \\(8192\\)",
        ),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, mistral, qwen2"),
        ({"model_type": None}, "model_type None is not one of"),
        ({"hidden_size": None, "vocab_size": None}, "here.json lacks vocab_size, hidden_size"),
        ({"num_attention_heads": 3}, "hidden_size=64 is not divisible by num_attention_heads=3"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
    ],
)
def test_what_the_network_cannot_compute_is_refused_by_name(changes: dict, message: str) -> None:
    fields = {name: value for name, value in {**FIELDS, **changes}.items() if value is not None}
    assert ModelConfig.from_json(FIELDS).rope_theta == 1e6
    with pytest.raises(PunaError, match=message):
        ModelConfig.from_json(fields, "here.json")


def test_both_spellings_of_rope_are_read() -> None:
    old = ModelConfig.from_json({**FIELDS, "rope_scaling": {"type": "linear", "factor": 4.0}})
    new = {name: value for name, value in FIELDS.items() if name != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    assert old == ModelConfig.from_json(new)
    assert (old.rope_theta, old.rope_scaling) == (1e6, {"rope_type": "linear", "factor": 4.0})
    assert ModelConfig.from_json({**FIELDS, "rope_scaling": {"rope_type": "default"}}).rope_scaling is None


def test_a_rotary_base_stated_in_two_ways_is_refused() -> None:
    default, linear = {"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "linear", "factor": 4.0}
    same = {
        **FIELDS,
        "rope_parameters": {**linear, "rope_theta": 1e6},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    assert ModelConfig.from_json(same).rope_scaling == linear
    with pytest.raises(PunaError, match=r"states the rope_theta twice, as 10000.0 and as 1000000.0; remove the wrong"):
        ModelConfig.from_json({**FIELDS, "rope_theta": 1e4, "rope_parameters": default})
    with pytest.raises(PunaError, match="states the scaling of the rotary positions twice"):
        ModelConfig.from_json({**FIELDS, "rope_parameters": default, "rope_scaling": linear})


def test_a_window_as_long_as_the_context_is_no_window() -> None:
    assert ModelConfig.from_json({**FIELDS, "model_type": "mistral", "sliding_window": 256}).model_type == "mistral"
    without = {**FIELDS, "model_type": "mistral", "sliding_window": None, "max_position_embeddings": 8192}
    assert ModelConfig.from_json(without).max_position_embeddings == 8192
    qwen = {**FIELDS, "model_type": "qwen2", "max_position_embeddings": 8192}
    for unused in ({}, {"sliding_window": 128}, {"sliding_window": 128, "use_sliding_window": False}):
        config = ModelConfig.from_json({**qwen, **unused})
        assert (config.attention_bias, config.attention_output_bias) == (True, False)
    with pytest.raises(PunaError, match="sliding_window 4096 is shorter than the context"):
        ModelConfig.from_json({**qwen, "use_sliding_window": True})


def test_missing_kv_heads_mean_as_many_as_heads() -> None:
    fields = {name: value for name, value in FIELDS.items() if name != "num_key_value_heads"}
    assert ModelConfig.from_json(fields).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number above 0"),
        ({"vocab_size": "512"}, "vocab_size is '512'; it must be a whole number"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; it must be a number, or left out"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a number"),
        ({"initializer_range": None}, "initializer_range is None"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"eos_token_id": ["</s>"]}, "it must be an id, a list of ids, or null"),
        ({"rope_theta": 0}, "rope_theta of the rotary positions is 0"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of the rotary positions is None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor of the rotary positions is None"),
    ],
)
def test_a_number_that_cannot_be_is_named(changes: dict, message: str) -> None:
    with pytest.raises(PunaError, match=message):
        ModelConfig.from_json({**preset("tiny-64").to_json(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; it must be a name"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type \['linear'\] is not supported, only default"),
        ({"quantization_config": "gptq"}, "quantization_config is 'gptq'; it must be an object"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window is '4096'; it must be a whole number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(changes: dict, message: str) -> None:
    with pytest.raises(PunaError, match=message):
        ModelConfig.from_json({**FIELDS, **changes})


def test_every_end_that_config_json_lists_is_kept() -> None:
    config = ModelConfig.from_json({**preset("tiny-64").to_json(), "eos_token_id": [2, 7]})
    assert config.eos_token_ids == (2, 7)
    assert config.to_json()["eos_token_id"] == [2, 7]


def test_ends_that_are_added_come_last_and_can_be_taken_away() -> None:
    config = preset("tiny-64").with_ends([2, 7])
    assert config.eos_token_ids == (2, 7)
    assert config.without_end(7) == preset("tiny-64")
    assert preset("tiny-64").without_end(2).eos_token_id is None
