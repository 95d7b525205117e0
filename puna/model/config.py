"""The shape of a model: the fields of `config.json`, and a table of the sizes we know by name.

A folder's `config.json` is always believed over a preset; a preset only starts a model from random weights, or says
what a size costs. What the network cannot compute is refused here, by name, before a byte of weights is read.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from puna.errors import PunaError, UsageError
from puna.files import read_json
from puna.model.shapes import weight_shapes

#: `model_type`s whose network is this one, and whether their q/k/v and output projections carry a bias when
#: `config.json` does not say (None: it must not; True/False: the family's own rule).
FAMILIES: dict[str, tuple[bool, bool]] = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
}

#: Family -> the sliding window of its attention where `config.json` does not speak of it.
DEFAULT_WINDOWS = {"mistral": 4096, "qwen2": 4096}

#: Families whose attention has a window only where `config.json` says `use_sliding_window`.
WITHOUT_WINDOW = {"qwen2"}

#: Rotary scalings that `rotary_frequencies` knows, and the numbers that each needs.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

#: Fields that are whole numbers above 0, each needed in `config.json`.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

#: Numbers that `config.json` may leave out.
NUMBERS = ("rms_norm_eps", "initializer_range")

#: Other kinds of fields, and what a field of each must be where it is there.
KINDS: dict[type, tuple[str, tuple[str, ...]]] = {
    str: ("a name", ("model_type", "hidden_act")),
    bool: ("true or false", ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")),
    dict: ("an object", ("rope_parameters", "rope_scaling", "quantization_config")),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-like model, with Hugging Face's field names.

    `rope_scaling` is None or a mapping with `rope_type` and its parameters, as in `config.json`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2  # some families end in several ways
    pad_token_id: int | None = None  # for other programs: rows are packed here
    initializer_range: float = 0.02
    model_type: str = "llama"

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise PunaError(
                    f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                    f"{self.num_attention_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise PunaError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of channels")
        if self.num_attention_heads % self.num_key_value_heads:
            raise PunaError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of num_key_value_heads="
                f"{self.num_key_value_heads}"
            )

    @classmethod
    def from_json(
        cls, fields: dict[str, Any], where: str = "config.json", *, rope_theta: float | None = None
    ) -> "ModelConfig":
        """Reads the content of a Hugging Face `config.json`.

        Args:
            fields: the parsed file; both the layout with `rope_theta` and the newer `rope_parameters` are read.
            where: the file's name, for messages.
            rope_theta: for a file that states none.

        Raises:
            PunaError: a field is missing, stated twice in two ways, or describes a network that this one is not.
        """
        for kind, (called, names) in KINDS.items():
            for name in names:
                if fields.get(name) is not None and not isinstance(fields[name], kind):
                    raise PunaError(f"{where}: {name} is {fields[name]!r}; it must be {called}")
        family = fields.get("model_type")
        if family not in FAMILIES:
            raise PunaError(f"{where}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
        if missing := [name for name in SIZES if fields.get(name) is None]:
            raise PunaError(f"{where} lacks {', '.join(missing)}")
        for name in (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"):
            value = fields.get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise PunaError(f"{where}: {name} is {value!r}; it must be a whole number above 0")
        for name in (*NUMBERS, "max_position_embeddings"):
            value = fields.get(name, 0)
            if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
                raise PunaError(f"{where}: {name} is {value!r}; it must be a number, or left out")
        ends_of(fields.get("eos_token_id"), where)
        theta, scaling = _rope(fields, where, rope_theta)
        if fields.get("hidden_act", "silu") != "silu":
            raise PunaError(f"{where}: hidden_act {fields['hidden_act']!r} is not supported, only 'silu'")
        context = fields.get("max_position_embeddings", 2048)
        _refuse_sliding_window(fields, context, where)
        qkv_bias, output_bias = FAMILIES[family]
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            num_hidden_layers=fields["num_hidden_layers"],
            num_attention_heads=fields["num_attention_heads"],
            num_key_value_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
            rope_theta=theta,
            max_position_embeddings=context,
            rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
            head_dim=fields.get("head_dim") or 0,
            rope_scaling=scaling,
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
            attention_bias=fields.get("attention_bias", qkv_bias),
            attention_output_bias=fields.get("attention_bias", False) if family == "llama" else output_bias,
            mlp_bias=fields.get("mlp_bias", False),
            bos_token_id=fields.get("bos_token_id", 1),
            eos_token_id=fields.get("eos_token_id", 2),
            pad_token_id=fields.get("pad_token_id"),
            initializer_range=fields.get("initializer_range", 0.02),
            model_type=family,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers, vLLM and llama.cpp's converter read."""
        if self.attention_output_bias != (self.attention_bias and self.model_type == "llama"):
            raise PunaError(
                f"model_type {self.model_type!r} cannot say attention_output_bias={self.attention_output_bias}"
            )
        names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
        fields = {
            "architectures": [names[self.model_type]],
            "hidden_act": "silu",
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
        }
        del fields["attention_output_bias"]
        if self.model_type != "llama":
            del fields["attention_bias"], fields["mlp_bias"]
        if self.model_type == "mistral":
            fields["sliding_window"] = None
        return fields

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return ends_of(self.eos_token_id)

    def with_ends(self, ends: Iterable[int]) -> "ModelConfig":
        """The same shape, whose texts end at these tokens too; those known already come first."""
        known = list(dict.fromkeys((*self.eos_token_ids, *ends)))
        return replace(self, eos_token_id=known if len(known) > 1 else next(iter(known), None))

    def without_end(self, end: int) -> "ModelConfig":
        """The same shape, whose texts do not end at this token."""
        return replace(self, eos_token_id=None).with_ends(each for each in self.eos_token_ids if each != end)

    @property
    def parameter_count(self) -> int:
        """Number of weights, a tied head counted once."""
        counts = {kind: sum(map(math.prod, shapes.values())) for kind, shapes in weight_shapes(self).items()}
        return sum(counts.values()) + (self.num_hidden_layers - 1) * counts["layer"]

    @property
    def matmul_parameter_count(self) -> int:
        """Weights of the matrices that multiply every token: the head is one, the embedding table is not."""
        layer = sum(math.prod(shape) for shape in weight_shapes(self)["layer"].values() if len(shape) == 2)
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size


def ends_of(stated: Any, where: str = "config.json") -> tuple[int, ...]:
    """The ids that an `eos_token_id` states: one, a list, or none.

    Raises:
        PunaError: it states something else.
    """
    ends = tuple(stated) if isinstance(stated, list) else () if stated is None else (stated,)
    if any(type(end) is not int for end in ends):
        raise PunaError(f"{where}: eos_token_id is {stated!r}; it must be an id, a list of ids, or null")
    return ends


def _rope(fields: dict[str, Any], where: str, rope_theta: float | None) -> tuple[float, dict[str, Any] | None]:
    stated = [dict(fields[name]) for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    thetas = [theta for each in (fields, *stated) if (theta := each.get("rope_theta")) is not None]
    for scaling in stated:
        scaling.pop("rope_theta", None)
        kind = scaling.pop("type", None) or "default"
        scaling.setdefault("rope_type", kind)
    for name, found in (("rope_theta", thetas), ("scaling of the rotary positions", stated)):
        if found[1:] and found[0] != found[1]:
            raise PunaError(f"{where} states the {name} twice, as {found[0]} and as {found[1]}; remove the wrong one")
    theta, scaling = (thetas or [rope_theta])[0], (stated or [{"rope_type": "default"}])[0]
    if theta is None:
        raise PunaError(
            f'{where} has no "rope_theta"; write down the one the model was trained with '
            "(1000000 for Code Llama, 10000 for Llama 2 and for 70B-Instruct)"
        )
    kind = scaling["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise PunaError(f"{where}: rope_type {kind!r} is not supported, only {', '.join(ROPE_TYPES)}")
    for name, value in [("rope_theta", theta), *((name, scaling.get(name)) for name in ROPE_TYPES[kind])]:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise PunaError(f"{where}: {name} of the rotary positions is {value!r}; it must be a number above 0")
    return float(theta), None if kind == "default" else scaling


def _refuse_sliding_window(fields: dict[str, Any], context: int, where: str) -> None:
    window = fields.get("sliding_window", DEFAULT_WINDOWS.get(fields["model_type"]))
    is_used = fields.get("use_sliding_window", fields["model_type"] not in WITHOUT_WINDOW)
    if window is not None and window < context and is_used:
        raise PunaError(
            f"{where}: sliding_window {window} is shorter than the context ({context}); not supported, unless it is "
            f"null there because the model was trained without"
        )


_7B = ModelConfig(32016, 4096, 11008, 32, 32, 32, rope_theta=1e6, max_position_embeddings=16384)
_13B = ModelConfig(32016, 5120, 13824, 40, 40, 40, rope_theta=1e6, max_position_embeddings=16384)
_34B = ModelConfig(32000, 8192, 22016, 48, 64, 8, rope_theta=1e6, max_position_embeddings=16384)
_70B = ModelConfig(32016, 8192, 28672, 80, 64, 8, rope_theta=1e6, max_position_embeddings=16384)
#: 70B Instruct and Python were not tuned for long contexts: theta of Llama 2, 4,096 positions.
_70B_SHORT = replace(_70B, rope_theta=1e4, max_position_embeddings=4096)

#: Models known by name. Vocabulary 32,016 where the tokenizer has infilling markers or `<step>`, 32,000 elsewhere.
PRESETS: dict[str, ModelConfig] = {
    "codellama-7b": _7B,
    "codellama-7b-python": replace(_7B, vocab_size=32000),
    "codellama-7b-instruct": _7B,
    "codellama-13b": _13B,
    "codellama-13b-python": replace(_13B, vocab_size=32000),
    "codellama-13b-instruct": _13B,
    "codellama-34b": _34B,
    "codellama-34b-python": _34B,
    "codellama-34b-instruct": _34B,
    "codellama-70b": _70B,
    "codellama-70b-python": _70B_SHORT,
    "codellama-70b-instruct": _70B_SHORT,
    "tiny-64": ModelConfig(512, 64, 176, 2, 4, 2, rope_theta=1e6, max_position_embeddings=2048),
    "tiny-128": ModelConfig(
        4096, 128, 344, 2, 4, 2, rope_theta=1e6, max_position_embeddings=2048, initializer_range=0.05
    ),
    "tiny-256": ModelConfig(4096, 256, 688, 4, 4, 2, rope_theta=1e6, max_position_embeddings=2048),
    "tiny-512": ModelConfig(32000, 512, 1376, 8, 8, 8, rope_theta=1e6, max_position_embeddings=4096),
}


def preset(name: str) -> ModelConfig:
    """The configuration of a model known by name.

    Raises:
        PunaError: there is no such name; the message lists those there are.
    """
    if name not in PRESETS:
        raise PunaError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def config_at_hand(model: str, start: str | None = None) -> ModelConfig:
    """The shape of a recipe's model without its weights: of the folder that it starts from, else of the preset.

    A folder may be on another machine only, where a run is planned or launched; then the preset serves.

    Args:
        model: a preset or a folder.
        start: the folder of weights that a run starts from, if that is another.

    Raises:
        UsageError: there is neither a folder with config.json nor a preset.
    """
    for folder in filter(None, (start, model)):
        path = Path(folder) / "config.json"
        if path.is_file():
            return ModelConfig.from_json(read_json(path), str(path))
    if model in PRESETS:
        return PRESETS[model]
    raise UsageError(
        f"{start or model}/config.json does not exist, so the model's shape is not known; do this where the model's "
        f"folder is, or name its size with model=PRESET start={start or model} (presets: {', '.join(PRESETS)})"
    )
