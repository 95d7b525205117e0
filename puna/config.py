"""The recipe: everything a training run depends on, in one YAML file, checked before anything is loaded.

    puna train tiny-pretrain data.train=data/mine optimizer.peak_lr=3e-4

takes `puna/recipes/tiny-pretrain.yaml` (or a path), applies the dotted overrides and checks the result against the
models below. The resolved recipe is stored in the run folder and in every checkpoint, and repeats the run.
"""

import difflib
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticKnownError

from puna.errors import UsageError

#: Recipes that ship with puna; the folder is the registry.
RECIPES = Path(__file__).parent / "recipes"


def _no_truth(value: Any) -> Any:
    """Keeps true from being taken for 1."""
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


Whole = Annotated[int, BeforeValidator(_no_truth)]
Positive = Annotated[Whole, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

#: A path, or a name; ~ is the home folder.
Location = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(_Strict):
    """What is learned from."""

    train: Location | Annotated[dict[Location, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """A prepared folder, or several with their weights: {data/mine: 0.9, data/chat: 0.1}."""
    valid: Location | None = None
    """A prepared folder that is only measured; null: none."""
    fill: Literal["auto", "end-to-end", "whole-documents"] = "auto"
    """How documents fill rows; auto: as the prepared folder says (whole documents for dialogs and infilling)."""

    @property
    def weights(self) -> dict[str, float]:
        """Prepared folder -> its weight in the mixture."""
        return {self.train: 1.0} if isinstance(self.train, str) else self.train


class Optimizer(_Strict):
    """AdamW (arXiv:1711.05101); weights of one dimension (norms, biases) do not decay."""

    name: Literal["adamw"] = "adamw"
    peak_lr: Annotated[float, Field(gt=0)] = 1e-5
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm, over all weights; null: they are used as they are."""
    state_bits: Literal[32, 8, 4] = 32
    """Bits of each number of the optimizer's state; 8 and 4 are block-wise. 32 means bf16 under bf16-pure."""
    in_backward: bool = False
    """Gradients leave the device as they are formed, so that only a few are there at a time; they wait in host memory,
    or, with one micro-batch and no `max_grad_norm`, are used at once."""


class Parallel(_Strict):
    """How devices share a run: pp x dp_replicate x dp_shard x cp x tp of them."""

    pp: Positive = 1
    """Pipeline stages: each holds a run of layers, micro-batches pass through them."""
    dp_replicate: Positive = 1
    """Replicas of the sharded weights; each reads its own rows."""
    dp_shard: Positive | Literal["auto"] = "auto"
    """Devices that share weights, gradients and optimizer state; each reads its own rows. auto: all that are left."""
    cp: Positive = 1
    """Devices that share the tokens of a row; they shard the weights too."""
    tp: Positive = 1
    """Devices that share every matrix, and the tokens between the matrices."""
    schedule: Literal["1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """The order of a pipeline's micro-batches; interleaved and zero-bubble want `stages_per_rank` of 2 or more."""
    stages_per_rank: Positive = 1
    """Runs of layers that each pipeline rank holds; more make the pipeline's idle time shorter."""
    layers_per_unit: Positive = 1
    """Layers whose weights are gathered together: more make fewer, larger messages and take more memory."""
    reshard: bool = True
    """Gathered weights are freed after the forward pass and gathered again for the backward pass; a zero-bubble
    pipeline keeps them all the same, for its backward pass in two parts finds no others."""

    @property
    def reshards(self) -> bool:
        """Whether gathered weights are freed after the forward pass."""
        return self.reshard and not (self.pp > 1 and self.schedule == "zero-bubble")


class Schedule(_Strict):
    """How the learning rate moves: up to the peak in `warmup_steps`, then down to `final_fraction` of it."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    final_fraction: Share = 1 / 30
    """Of the peak, one step behind the last; 1/30 is Code Llama's. A constant schedule takes no notice of it."""


class Validation(_Strict):
    """When the loss on `data.valid` is measured, and on how much."""

    every: Positive = 100
    """Steps between two measurements; the last step is always measured."""
    rows: Positive = 64
    """Rows measured, drawn from all over the data, the same ones every time."""


class Checkpoint(_Strict):
    """When the state is saved, and what is kept."""

    every: Positive = 100
    """Steps between two checkpoints; the last step is always saved."""
    keep: Positive = 3
    """How many of the newest are kept."""
    keep_every: Positive | None = None
    """The first checkpoint at or behind each multiple of this step is kept for good."""


class Log(_Strict):
    """Where numbers go besides metrics.jsonl, which has every step."""

    every: Positive = 1
    """Steps between two updates of the terminal."""
    tensorboard: bool = False


class Recipe(_Strict):
    """A training run."""

    model: Location
    """A preset (random weights) or a folder in Hugging Face layout (its weights)."""
    start: Location | None = None
    """A folder in Hugging Face layout whose weights and config.json are taken instead; null: as `model` says."""
    data: Data
    sequence_length: Annotated[Whole, Field(ge=2)] = 4096
    run_dir: Location
    steps: Positive
    batch_tokens: Positive
    """Tokens of one optimizer step over all devices; a multiple of `sequence_length`."""
    micro_batch_rows: Positive = 1
    """Rows of one device that go through the model at once; changes memory and speed, not the result."""
    precision: Literal["auto", "fp32", "bf16", "bf16-pure"] = "auto"
    """bf16: fp32 weights, bf16 products. bf16-pure: weights and optimizer state too, with stochastic rounding.
    auto: bf16 where the device multiplies it natively, else fp32."""
    optimizer: Optimizer = Optimizer()
    parallel: Parallel = Parallel()
    schedule: Schedule = Schedule()
    arithmetic: Literal["sound", "mindformers"] = "sound"
    """mindformers repeats the steps of MindFormers, for comparison: Adam without bias correction, update n at the rate
    of n - 1 (the first moves nothing), the mean of the means of micro-batches instead of the mean over all targets."""
    recompute: Literal["none", "selective", "block", "offload"] = "none"
    """Activations computed again in the backward pass: none; all but matrix products and attention; whole blocks; whole
    blocks, whose inputs wait in host memory."""
    recompute_layers: Positive | None = None
    """Layers of each pipeline stage that do so, the first ones; null: all. `puna plan` finds how many must."""
    compile: bool = False
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    device: str = "auto"
    seed: Annotated[Whole, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _rows_fit(self) -> "Recipe":
        if self.batch_tokens % self.sequence_length:
            rows = max(1, round(self.batch_tokens / self.sequence_length))
            raise ValueError(
                f"batch_tokens={self.batch_tokens} must be a multiple of sequence_length={self.sequence_length}; "
                f"the nearest is {rows * self.sequence_length}"
            )
        if self.batch_rows % self.micro_batch_rows:
            fits = [n for n in range(1, self.batch_rows + 1) if self.batch_rows % n == 0]
            raise ValueError(
                f"micro_batch_rows={self.micro_batch_rows} must divide the {self.batch_rows} rows of a batch; "
                f"use one of {fits}"
            )
        if self.recompute == "none" and self.recompute_layers is not None:
            raise ValueError(
                f"recompute_layers={self.recompute_layers} needs recompute=selective, block or offload; or use "
                f"recompute_layers=null"
            )
        if self.arithmetic == "mindformers" and self.parallel.cp > 1:
            raise ValueError("arithmetic=mindformers takes the mean of whole rows; use parallel.cp=1")
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is more than steps={self.steps}; use "
                f"{self.steps} or less"
            )
        return self

    @property
    def batch_rows(self) -> int:
        """Rows of one optimizer step, over all devices."""
        return self.batch_tokens // self.sequence_length

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(
    name: Recipe | str | Path | dict[str, Any], overrides: list[str] | dict[str, Any] | None = None
) -> Recipe:
    """Reads a recipe, applies overrides and checks it.

    Args:
        name: a shipped recipe's name, a YAML file, or the content itself, checked already or not.
        overrides: `["optimizer.peak_lr=1e-5", …]` or {"optimizer.peak_lr": 1e-5, …}.

    Raises:
        UsageError: no such recipe, not YAML, an unknown field or a wrong value; lists what there is.
    """
    name = name.model_dump() if isinstance(name, Recipe) else name
    content, where = (name, "recipe") if isinstance(name, dict) else (_read(name), str(name))
    for path, value in parse_overrides(overrides or {}).items():
        content = _with(content, path.split("."), value)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{where}: " + "; ".join(_message(e) for e in error.errors())) from None


def recipe_names() -> list[str]:
    """The recipes that ship with puna."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def _read(name: str | Path) -> dict[str, Any]:
    shipped = RECIPES / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        raise UsageError(f"there is no recipe {name!s}: neither a file nor one of {', '.join(recipe_names())}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold fields and values (model: …), not {type(content).__name__}")
    if isinstance(content.get("model"), dict) and "model_config" in content["model"]:
        raise UsageError(f"{path} is a YAML of MindFormers; make a recipe of it: puna migrate {path} -o recipe.yaml")
    return content


#: Words that are not read as text. YAML 1.1 has more of them: 010 is 8 there, 1:30 is 90, and no folder can be called
#: yes or 2026-11-26.
_NO_TEXT = {
    "null": "~|null|Null|NULL|",
    "bool": "true|false",
    "int": r"0|-?[1-9]\d*",
    "float": r"-?(\d+\.(0|\d*[1-9])(e[-+]\d+)?|\.inf)",
    "merge": "<<",
}


class _Loader(yaml.SafeLoader):
    """Reads words as `_NO_TEXT` says, and refuses a field that is given twice: YAML's own readers forget the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    None: [(f"tag:yaml.org,2002:{kind}", re.compile(rf"({words})\Z")) for kind, words in _NO_TEXT.items()]
}


def parse_overrides(overrides: list[str] | dict[str, Any]) -> dict[str, Any]:
    """`["optimizer.peak_lr=1e-5", …]` as {"optimizer.peak_lr": 1e-5, …}; a dict is that already.

    Raises:
        UsageError: one of them is not of the form field.name=value.
    """
    if isinstance(overrides, dict):
        return overrides
    pairs: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UsageError(f"{override!r} is not of the form field.name=value")
        try:
            pairs[path] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            why = getattr(error, "problem", None)
            raise UsageError(f"{override!r}: the value is not valid YAML{f': {why}' if why else ''}") from None
    return pairs


def override_words(overrides: list[str] | dict[str, Any]) -> list[str]:
    """Overrides as words of a command line, which `parse_overrides` reads back."""
    if not isinstance(overrides, dict):
        return overrides
    return [f"{path}={_as_yaml(value)}" for path, value in overrides.items()]


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").rstrip("\n")


def _with(content: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy of `content` with the value at `path` replaced."""
    head, *rest = path
    if not rest:
        return {**content, head: value}
    inner = content.get(head)
    return {**content, head: _with(inner if isinstance(inner, dict) else {}, rest, value)}


def _message(error: Any) -> str:
    path = [part for part in map(str, error["loc"]) if not re.match(r"function-|dict\[", part)]  # kinds of data.train
    name = ".".join(path) or "recipe"
    if error["type"] == "extra_forbidden":
        fields = _fields_of(path[:-1])
        close = difflib.get_close_matches(path[-1], fields, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        return f"there is no field {name}{meant}; there are {', '.join(fields)}"
    if error["type"] == "missing":
        return f"the field {name} is missing; give it in the file or as {name}=VALUE"
    if error["type"] == "string_type" and isinstance(error["input"], int | float):
        kind, value = type(error["input"]).__name__, _as_yaml(error["input"])
        return f"{name}={value} is read as {kind}, not as text; write '{name}=\"{value}\"'"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{name}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _fields_of(path: list[str]) -> list[str]:
    model: Any = Recipe
    for part in path:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        model = field.annotation
    return list(model.model_fields)
