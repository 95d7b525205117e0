"""The recipe that a YAML of MindFormers stands for, and the command for one that only predicts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from puna.checkpoint.formats.mindspore.model_config import from_fields, known_as, model_fields
from puna.config import Recipe, load_recipe
from puna.errors import PunaError, UsageError
from puna.model.config import PRESETS, ModelConfig

#: Names, in the recipe, of what its user makes with puna before the first step.
TRAIN_DATA, VALID_DATA, WEIGHTS = "data/train", "data/valid", "weights"

#: Steps where neither the YAML nor the data say how many there are.
SOME_STEPS = 1000

#: MindFormers' ways to run a YAML that become a recipe or a command.
RUN_MODES = ("train", "finetune", "predict")

#: MindFormers' schedule -> ours.
SCHEDULES = {
    "CosineWithWarmUpLR": "cosine",
    "LinearWithWarmUpLR": "linear",
    "ConstantWarmUpLR": "constant",
}

#: MindFormers' optimizers that do not correct the bias of their running means, by name and by alias; their eps is 1e-6
#: where a YAML states none, that of the others 1e-8.
UNCORRECTED = (
    "FP32StateAdamWeightDecay", "AdamWeightDecay", "FusedAdamWeightDecay", "fp32_adamw", "adamw", "fused_adamw",
)  # fmt: skip

#: MindFormers' compute_dtype -> precision.
PRECISIONS = {"float16": "bf16", "bfloat16": "bf16", "float32": "fp32"}

#: A recipe's name for a way of recomputing -> MindFormers' key; where layers have both, the first is used.
RECOMPUTE = {"block": "recompute_config.recompute", "selective": "recompute_config.select_recompute"}


@dataclass(frozen=True)
class Settings:
    """A YAML's values by dotted key, with MindFormers' defaults where it gives none."""

    content: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a key; the default where the key is missing or empty."""
        value: Any = self.content
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return default if value is None or value == "" else value

    def number(self, key: str, default: float) -> float:
        """A number at a key; YAML takes `1e-5` for a text.

        Raises:
            UsageError: the value is no number.
        """
        value = self.get(key, default)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UsageError(f"{key} is {value!r}; a number was expected")
        return number

    def whole(self, key: str, default: int) -> int:
        """A whole number at a key; errors as for `number`."""
        value = self.number(key, default)
        if not value.is_integer():
            raise UsageError(f"{key} is {value!r}; a whole number was expected")
        return int(value)


def check_feasible(settings: Settings, where: str) -> None:
    """Refuses a YAML that neither a recipe nor a command stands for.

    Raises:
        UsageError: it neither trains nor predicts.
        PunaError: its network has experts.
    """
    mode = settings.get("run_mode", "train")
    if mode not in RUN_MODES:
        raise UsageError(
            f"run_mode {mode!r} is not one that puna migrate has; choose one of {', '.join(RUN_MODES)}; "
            "`puna evaluate` scores models"
        )
    for key in ("moe_config.expert_num", "model.model_config.moe_config.expert_num"):
        if (experts := settings.whole(key, 1)) > 1:
            raise PunaError(f"{where}: {key} is {experts}; puna has no network with experts")


def recipe_of(settings: Settings, *, where: str, rows: int | None, is_faithful: bool) -> Recipe:
    """The recipe, checked.

    Args:
        settings: the YAML's.
        where: its name, for messages.
        rows: of the data, to count the steps of an epoch.
        is_faithful: keep MindFormers' arithmetic.

    Raises:
        UsageError: a value is not one that puna can take.
        PunaError: puna does not have the model.
    """
    config = from_fields(model_fields(settings.content, where), where)
    names = [name for name in known_as(config) if _is_same(PRESETS[name], config)]
    length = settings.whole("model.model_config.seq_length", 2048)
    global_rows = batch_rows(settings)
    steps = step_count(settings, rows)
    name, peak = schedule(settings), peak_lr(settings)
    end = settings.number("lr_schedule.lr_end", 0) if name == "cosine" else 0  # the others take no notice of it
    has_weights = bool(settings.get("load_checkpoint")) or not names
    layout = parallel(settings)
    parts = max(1, layout.get("tp", 1))  # a row is shared by so many ranks
    fields: dict[str, Any] = {
        "model": names[0] if names else WEIGHTS,
        "start": WEIGHTS if has_weights and names else None,
        "data": {"train": TRAIN_DATA, "valid": VALID_DATA if settings.get("do_eval", False) else None},
        "sequence_length": -(-(length + 1) // parts) * parts if is_faithful else length,
        "run_dir": f"{str(settings.get('output_dir', './output')).removeprefix('./').rstrip('/')}/puna",
        "steps": steps,
        "micro_batch_rows": settings.whole("runner_config.batch_size", 1),
        "precision": PRECISIONS.get(str(settings.get("model.model_config.compute_dtype", "float16")), "bf16"),
        "optimizer": {
            "peak_lr": peak,
            "betas": betas(settings),
            "eps": settings.number("optimizer.eps", 1e-6 if optimizer_type(settings) in UNCORRECTED else 1e-8),
            "weight_decay": settings.number("optimizer.weight_decay", 0.0),
            "max_grad_norm": max_grad_norm(settings),
        },
        "schedule": {
            "name": name,
            "warmup_steps": min(warmup_steps(settings, steps), steps),
            "final_fraction": end / peak if peak else 0.0,
        },
        "parallel": layout,
        **recompute(settings),
        "checkpoint": {
            "every": settings.whole("callbacks.CheckpointMonitor.save_checkpoint_steps", SOME_STEPS),
            "keep": settings.whole("callbacks.CheckpointMonitor.keep_checkpoint_max", 5),
        },
        "log": {"every": settings.whole("callbacks.MFLossMonitor.per_print_times", 1)},
        "device": "cpu" if settings.get("context.device_target", "Ascend") == "CPU" else "auto",
        "seed": settings.whole("seed", 0),
    }
    fields["batch_tokens"] = global_rows * fields["sequence_length"]
    if (every := settings.whole("eval_step_interval", -1)) > 0:
        fields["validation"] = {"every": every}
    if is_faithful:
        fields["arithmetic"] = "mindformers"
    return load_recipe(fields)


def value_differences(settings: Settings, recipe: Recipe) -> list[str]:
    """What the YAML asks for that a recipe cannot express."""
    found = []
    if recipe.model == WEIGHTS and not settings.get("load_checkpoint"):
        found.append(
            f"model: no preset has these sizes and rotary positions, and the YAML names no weights; {WEIGHTS} must be "
            "a folder in Hugging Face layout"
        )
    if first := settings.number("lr_schedule.warmup_lr_init", 0):
        found.append(f"lr_schedule.warmup_lr_init: the warm-up starts from 0, not from {first:g}")
    if "adam" not in (optimizer := optimizer_type(settings)).lower():
        found.append(f"optimizer.type: {optimizer} is not there; the optimizer is AdamW")
    return found


def arithmetic_differences(settings: Settings, recipe: Recipe) -> list[str]:
    """Where Adam or the mean of the losses is not as MindFormers has it by this YAML."""
    optimizer, found = optimizer_type(settings), []
    is_adam, corrects = "adam" in optimizer.lower(), optimizer not in UNCORRECTED
    is_mean = bool(settings.get("calculate_per_token_loss", False))
    if recipe.arithmetic == "mindformers":
        if is_adam and corrects:
            found.append(f"optimizer.type: {optimizer} corrects the bias of its running means; this recipe does not")
        if is_mean:
            found.append("calculate_per_token_loss: left out; the loss is the mean of the means of micro-batches")
        return found
    if is_adam and not corrects:
        found.append(f"AdamW corrects the bias of its running means; {optimizer} does not, and has smaller first steps")
    if not is_mean:
        found.append("the loss is the mean over all targets of a batch; there the mean of the means of micro-batches")
    return found


def _is_same(known: ModelConfig, config: ModelConfig) -> bool:
    """Whether two models of the same sizes also agree in what else decides their outputs."""
    names = ("rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings")
    return all(getattr(known, name) == getattr(config, name) for name in names)


def batch_rows(settings: Settings) -> int:
    """Rows of a step over all devices, as MindFormers counts them."""
    rows = settings.whole("runner_config.batch_size", 1)
    if not settings.get("use_parallel", False):
        return rows  # one device, which neither splits nor gathers, whatever parallel_config says
    rows *= settings.whole("parallel_config.data_parallel", 1)
    if settings.whole("parallel_config.pipeline_stage", 1) > 1:
        micro_batches = settings.whole("parallel_config.micro_batch_num", 1)
        return rows * micro_batches * settings.whole("micro_batch_interleave_num", 1)
    if settings.whole("parallel.parallel_mode", 1) == 0:
        return rows  # devices are data_parallel, and nothing is accumulated
    accumulated = settings.whole("runner_config.gradient_accumulation_steps", 1)
    return rows * accumulated * settings.whole("micro_batch_interleave_num", 1)


def step_count(settings: Settings, rows: int | None) -> int:
    """Steps of the run: stated, or those of its epochs."""
    stated = settings.whole("lr_schedule.total_steps", -1)
    if stated > 0:
        return stated
    return SOME_STEPS if rows is None else steps_of_epochs(settings, rows)


def steps_of_epochs(settings: Settings, rows: int) -> int:
    """Steps that MindFormers takes."""
    return max(1, settings.whole("runner_config.epochs", 1) * (rows // max(1, batch_rows(settings))))


def warmup_steps(settings: Settings, steps: int) -> int:
    """Updates until the peak."""
    ratio = settings.get("lr_schedule.warmup_ratio")
    if ratio is not None:
        return int(settings.number("lr_schedule.warmup_ratio", 0) * steps)
    return settings.whole("lr_schedule.warmup_steps", 0)


def peak_lr(settings: Settings) -> float:
    """The highest learning rate."""
    own = settings.number("optimizer.learning_rate", 0)
    return settings.number("lr_schedule.learning_rate", own or 1e-5)


def betas(settings: Settings) -> Any:
    """Adam's betas, which stand in one key or two."""
    pair = settings.get("optimizer.betas")
    if pair is not None:
        return pair
    return [settings.number("optimizer.beta1", 0.9), settings.number("optimizer.beta2", 0.999)]


def optimizer_type(settings: Settings) -> str:
    """The name of MindFormers' optimizer."""
    return str(settings.get("optimizer.type", "AdamW"))


def max_grad_norm(settings: Settings) -> float | None:
    """The norm that gradients are clipped to; None: they are not clipped."""
    is_clipped = settings.get("runner_wrapper.use_clip_grad", False)
    return settings.number("runner_wrapper.max_grad_norm", 1.0) if is_clipped else None


def schedule(settings: Settings) -> str:
    """The name of the schedule of the learning rate; without one MindFormers keeps optimizer.learning_rate."""
    if not settings.get("lr_schedule"):
        return "constant"
    name = str(settings.get("lr_schedule.type", "CosineWithWarmUpLR"))
    if name not in SCHEDULES:
        raise UsageError(f"lr_schedule.type {name!r} is not one that puna has; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def parallel(settings: Settings) -> dict[str, Any]:
    """The recipe's `parallel`: sizes of the axes, and the schedule."""
    if not settings.get("use_parallel", False):
        return {"dp_shard": 1}
    axes = {
        "pp": settings.whole("parallel_config.pipeline_stage", 1),
        "cp": settings.whole("parallel_config.context_parallel", 1),
        "tp": settings.whole("parallel_config.model_parallel", 1),
    }
    copies = settings.whole("parallel_config.data_parallel", 1)
    is_sharded = settings.get("parallel.enable_parallel_optimizer", False)
    axes |= {"dp_shard": copies} if is_sharded else {"dp_replicate": copies, "dp_shard": 1}
    stages = settings.whole("model.model_config.pp_interleave_num", 1)
    return {**axes, "stages_per_rank": stages, "schedule": "interleaved"} if stages > 1 else axes


def recompute(settings: Settings) -> dict[str, Any]:
    """What is computed again in the backward pass, or waits in host memory, and in how many layers of a stage."""
    if settings.get("swap_config.swap", False):
        return {"recompute": "offload"}
    per_stage = layers_of_a_stage(settings)
    for mode, key in RECOMPUTE.items():
        if most := max(recomputed_layers(settings.get(key, False), per_stage)):
            return {"recompute": mode} | ({"recompute_layers": most} if most < per_stage else {})
    return {"recompute": "none"}


def recompute_differences(settings: Settings) -> list[str]:
    """What of the YAML's recomputation a recipe cannot say: it has one mode, and one number for all stages."""
    per_stage = layers_of_a_stage(settings)
    found = {key: recomputed_layers(settings.get(key, False), per_stage) for key in RECOMPUTE.values()}
    used = [key for key, counts in found.items() if max(counts)]
    if not used or settings.get("swap_config.swap", False):
        return []
    uneven = [
        f"{key}: {min(counts)} to {max(counts)} layers by stage; recompute_layers is one number for all, the greatest"
        for key, counts in found.items()
        if key == used[0] and len(counts) > 1
    ]
    return uneven + [f"{key}: left out beside {used[0]}; a recipe has one of both" for key in used[1:]]


def layers_of_a_stage(settings: Settings) -> int:
    """Layers of the largest run of layers that a rank of the pipeline holds."""
    stages = 1
    if settings.get("use_parallel", False):
        stages = settings.whole("parallel_config.pipeline_stage", 1)
        stages *= settings.whole("model.model_config.pp_interleave_num", 1)
    return -(-settings.whole("model.model_config.num_layers", 32) // max(1, stages))


def recomputed_layers(value: Any, per_stage: int) -> set[int]:
    """For how many layers a switch is on, in the stages: a set of the different numbers.

    Args:
        value: of MindFormers: true or false for all; a list of numbers or of such for the stages, with a list inside
            for each run of layers of one; names of operations; or operation -> any of these.
        per_stage: layers of a stage.
    """
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(parts, list):
        return set().union(*(recomputed_layers(part, per_stage) for part in parts)) or {0}
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return {min(max(value, 0), per_stage) if is_count else per_stage * bool(value)}


def generation(settings: Settings) -> str:
    """The command that completes a prompt as a YAML for prediction asks for."""
    model = "model.model_config."
    words = ["puna generate", WEIGHTS, "'def quick_sort(arr):'"]
    length = settings.whole(f"{model}max_decode_length", 1024)
    words.append(f"--max-tokens {settings.whole(f'{model}max_new_tokens', length)}")
    if settings.get(f"{model}do_sample", True):
        words.append(f"--temperature {settings.number(f'{model}temperature', 1.0):g}")
        words.append(f"--top-k {settings.whole(f'{model}top_k', 5)} --top-p {settings.number(f'{model}top_p', 1.0):g}")
    penalty = settings.number(f"{model}repetition_penalty", 1.0)
    return " ".join([*words, *([f"--repetition-penalty {penalty:g}"] if penalty != 1 else [])])
