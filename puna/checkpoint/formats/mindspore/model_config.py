"""The shape of a model from MindFormers' YAML, or from the shapes of its weights; and the YAML of a shape.

A `.ckpt` says the sizes of its tensors and nothing else. Sizes alone leave open how many heads there are, the rotary
base and the context length; these come from a YAML, a `config.json`, the name of a preset or, for the base, a number.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from puna.checkpoint.formats import check_plain_llama, pattern_of
from puna.checkpoint.huggingface import load_config
from puna.checkpoint.tensors import StoredTensor, dtype_name
from puna.errors import PunaError
from puna.model.config import PRESETS, ModelConfig

#: `extend_method`s that change nothing.
NO_EXTENSION = (None, "None", "none", "")


def config_of(
    weights: Mapping[str, StoredTensor], where: str, stated: str | Path | None, rope_theta: float | None
) -> ModelConfig:
    """The shape of the model of these weights.

    Args:
        weights: by MindFormers' names.
        where: what they were read from, for messages.
        stated: MindFormers' YAML, a `config.json`, or the name of a preset; None: what the sizes tell.
        rope_theta: where nothing else states it.

    Raises:
        PunaError: something is not stated anywhere, or the weights have other sizes than are stated.
    """
    sizes = _sizes(weights, where)
    if stated is None:
        return _recognised(sizes, where, rope_theta)
    config = _stated(stated, rope_theta)
    for name, size in sizes.items():
        if getattr(config, name) != size:
            whole = getattr(config, name)
            is_part = size > 0 and whole % size == 0
            hint = "; of slices, name the folder that holds those of all ranks" if is_part else ""
            raise PunaError(f"{stated} makes {name} {whole}, but the weights of {where} make it {size}{hint}")
    return config


def from_yaml(path: Path, rope_theta: float | None = None) -> ModelConfig:
    """The shape that the `model_config` of MindFormers' YAML describes.

    Raises:
        PunaError: it is not YAML, has no Llama in it, or one that puna's network is not.
    """
    return from_fields(model_fields(read_yaml(path), str(path)), str(path), rope_theta)


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file.

    Raises:
        PunaError: it is missing, or not YAML with fields.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PunaError(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise PunaError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise PunaError(f"{path} holds no fields; it is no configuration of MindFormers")
    return content


def model_fields(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `model.model_config`.

    Raises:
        PunaError: there are none.
    """
    model = content.get("model")
    fields = model.get("model_config") if isinstance(model, dict) else None
    if not isinstance(fields, dict):
        raise PunaError(f"{where} has no model.model_config; it is no configuration of a model of MindFormers")
    return fields


def from_fields(fields: Mapping[str, Any], where: str, rope_theta: float | None = None) -> ModelConfig:
    """The shape that the fields of `model.model_config` describe; what they leave out has LlamaConfig's defaults.

    Raises:
        PunaError: they describe a network that puna does not have, or a value is not one that a model can have.
    """
    if fields.get("type", "LlamaConfig") != "LlamaConfig":
        raise PunaError(f"{where} describes {fields['type']}, not LlamaConfig; puna has no such network")
    try:
        theta, scaling = _rotary(fields, where, rope_theta)
        heads, hidden = int(fields.get("num_heads", 32)), int(fields.get("hidden_size", 4096))
        config = ModelConfig(
            vocab_size=int(fields.get("vocab_size", 32000)),
            hidden_size=hidden,
            intermediate_size=feed_forward_width(fields, hidden),
            num_hidden_layers=int(fields.get("num_layers", 32)),
            num_attention_heads=heads,
            num_key_value_heads=int(fields.get("n_kv_heads") or heads),
            rope_theta=theta,
            max_position_embeddings=int(fields.get("max_position_embedding") or fields.get("seq_length", 2048)),
            rms_norm_eps=float(fields.get("rms_norm_eps", 1e-5)),
            rope_scaling=scaling,
            tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
            bos_token_id=fields.get("bos_token_id", 1),
            eos_token_id=fields.get("eos_token_id", 2),
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise PunaError(f"{where}: a value of model.model_config is not one that a model can have ({error})") from None
    return replace(config, max_position_embeddings=_trained_context(config))


def feed_forward_width(fields: Mapping[str, Any], hidden: int) -> int:
    """F as MindFormers computes it."""
    if fields.get("intermediate_size"):
        return int(fields["intermediate_size"])
    width = 4 * hidden
    if fields.get("ffn_dim_multiplier") is not None:
        width = int((fields["ffn_dim_multiplier"] + 0.01) * width)
    width, multiple = int(2 * width / 3), int(fields.get("multiple_of", 256))
    return -(-width // multiple) * multiple


def to_yaml(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> str:
    """MindFormers' `model:` section for a shape; of several tokens that end a text it names the first.

    Raises:
        PunaError: its Llama has no such network.
    """
    linear = config.rope_scaling is None or config.rope_scaling["rope_type"] == "linear"
    more = {
        "rope_scaling other than linear": not linear,
        "a head tied to the embedding": config.tie_word_embeddings,
    }
    check_plain_llama(config, "MindFormers' Llama", more)
    dtype = next(iter(tensors.values())).dtype
    fields = {
        "type": "LlamaConfig",
        "seq_length": min(4096, config.max_position_embeddings),
        "max_position_embedding": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "theta": config.rope_theta,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": next(iter(config.eos_token_ids), None),
        "pad_token_id": 0,
        "ignore_token_id": -100,
        "param_init_type": dtype_name(dtype),
        "compute_dtype": dtype_name(dtype),
        "extend_method": "None" if config.rope_scaling is None else "PI",
        "scaling_factor": 1.0 if config.rope_scaling is None else config.rope_scaling["factor"],
    }
    content = {"model": {"model_config": fields, "arch": {"type": "LlamaForCausalLM"}}}
    return yaml.safe_dump(content, sort_keys=False)


def known_as(config: ModelConfig) -> list[str]:
    """Names of the presets of the same sizes."""
    return [name for name, known in PRESETS.items() if _sizes_of(known) == _sizes_of(config)]


def _stated(stated: str | Path, rope_theta: float | None) -> ModelConfig:
    path = Path(stated)
    if path.suffix in (".yaml", ".yml"):
        return from_yaml(path, rope_theta)
    if path.is_dir() or path.name == "config.json":
        return load_config(path if path.is_dir() else path.parent, rope_theta=rope_theta)
    if path.suffix == ".json":
        raise PunaError(f"{path} must be called config.json" if path.exists() else f"{path} does not exist")
    if str(stated) not in PRESETS:
        raise PunaError(
            f"{stated} is neither a YAML of MindFormers, a config.json or its folder, nor one of {', '.join(PRESETS)}"
        )
    config = PRESETS[str(stated)]
    return config if rope_theta is None else replace(config, rope_theta=rope_theta)


def _recognised(sizes: dict[str, int], where: str, rope_theta: float | None) -> ModelConfig:
    """The preset of these sizes with the base that was stated."""
    names = [name for name, known in PRESETS.items() if all(getattr(known, key) == n for key, n in sizes.items())]
    if not names:
        raise PunaError(
            f"{where} has other sizes than all presets, and does not say how many heads it has; "
            "give MindFormers' YAML or a config.json with --config"
        )
    fitting = [name for name in names if rope_theta in (None, PRESETS[name].rope_theta)]
    if rope_theta is None:
        raise PunaError(
            f"{where} does not state the rotary base; give MindFormers' YAML with --config, or --config {names[0]}, "
            "or the base itself, e.g. --rope-theta 1000000 (Code Llama) or 10000 (Llama 2)"
        )
    config = PRESETS[(fitting or names)[0]]
    return config if fitting else replace(config, rope_theta=rope_theta, max_position_embeddings=4096)


def _rotary(fields: Mapping[str, Any], where: str, rope_theta: float | None) -> tuple[float, dict[str, Any] | None]:
    theta = float(fields.get("theta", 10_000.0))
    if rope_theta not in (None, theta):
        raise PunaError(f"{where} states theta {theta:g}, not {rope_theta:g}; leave out --rope-theta")
    method, factor = fields.get("extend_method"), fields.get("scaling_factor", 1.0)
    if method in NO_EXTENSION:
        return theta, None
    if method == "PI":
        return theta, {"rope_type": "linear", "factor": float(factor)}
    if method == "NTK":
        return theta * float(factor), None
    raise PunaError(f"{where}: extend_method {method!r} is not supported, only None, PI and NTK")


def _trained_context(config: ModelConfig) -> int:
    """The context a known model was trained with, where the YAML states the shorter one of its runs."""
    known = [PRESETS[name] for name in known_as(config)]
    contexts = [preset.max_position_embeddings for preset in known if preset.rope_theta == config.rope_theta]
    return max([config.max_position_embeddings, *contexts])


def _sizes(weights: Mapping[str, StoredTensor], where: str) -> dict[str, int]:
    """Fields of a config that the shapes of the weights show."""
    layers = {int(number) for name in weights if (number := pattern_of(name)[0])}
    if not layers or layers != set(range(len(layers))):
        gap = min(set(range(max(layers, default=0) + 1)) - layers)
        raise PunaError(f"{where} holds no weights of layer {gap}; it is not a whole model")
    embedding = _shape(weights, where, "model.tok_embeddings.embedding_weight")
    first = "model.layers.0"
    if f"{first}.feed_forward.w_gate_hidden.weight" in weights:
        width = _shape(weights, where, f"{first}.feed_forward.w_gate_hidden.weight")[0] // 2
    else:
        width = _shape(weights, where, f"{first}.feed_forward.w1.weight")[0]
    sizes = dict(zip(("vocab_size", "hidden_size"), embedding, strict=True))
    return {**sizes, "intermediate_size": width, "num_hidden_layers": len(layers)}


def _shape(weights: Mapping[str, StoredTensor], where: str, name: str) -> tuple[int, ...]:
    if name not in weights:
        raise PunaError(f"{where} lacks {name}; it is not a whole model")
    if len(weights[name].shape) != 2:
        raise PunaError(f"{where}: {name} has shape {weights[name].shape}; a matrix was expected")
    return weights[name].shape


def _sizes_of(config: ModelConfig) -> tuple[int, ...]:
    return (
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
        config.num_attention_heads, config.num_key_value_heads,
    )  # fmt: skip
