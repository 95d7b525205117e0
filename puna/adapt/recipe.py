"""Which recipe fits: the first of a few, from the plainest to the most sparing, that this device has memory for."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from puna.checkpoint import load_config
from puna.config import Recipe, load_recipe
from puna.devices import free_memory_bytes, pick_device
from puna.errors import PunaError, UsageError
from puna.files import read_json
from puna.model.config import ModelConfig
from puna.plan import plan

if TYPE_CHECKING:
    from puna.adapt.stages import Places

#: Ways to train all weights, each with less memory than the one before. Low-bit state and stochastic rounding cost
#: little; computing activations again costs up to a third of the time.
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": "selective"},
    {"recompute": "block"},
    {"recompute": "selective", "precision": "bf16-pure"},
    {"recompute": "block", "precision": "bf16-pure", "optimizer.state_bits": 8},
)

#: Of a CPU's free memory, what a plan may take: others use the machine, and recomputed blocks take more than planned.
CPU_SHARE = 0.85

#: At least so many weights -> peak learning rate. The first is Code Llama's own for fine-tuning; the others are those
#: that this project's small models learn well with.
PEAK_LR = {10**9: 1e-5, 10**8: 1e-4, 0: 1e-3}

#: Rows of a batch are chosen so that there are about so many steps, as far as batches need not be larger than that.
STEPS, LARGEST_BATCH_ROWS = 200, 32

#: Rows are no longer than Code Llama's, and short enough that the code fills at least so many.
LONGEST_ROW, SHORTEST_ROW, FEWEST_ROWS = 4096, 256, 64

#: Of code, about: the length of rows is chosen before the code is encoded.
BYTES_A_TOKEN = 3

#: Tokens of so much code that rows are the longest and batches the largest.
MUCH_CODE = 2 * STEPS * LARGEST_BATCH_ROWS * LONGEST_ROW


def row_length(config: ModelConfig, tokens: float) -> int:
    """Tokens of a row of a model's, for so many tokens of code."""
    length = min(LONGEST_ROW, config.max_position_embeddings)
    while length > SHORTEST_ROW and tokens < FEWEST_ROWS * length:
        length //= 2
    return length


def check_recipe(at: "Places", epochs: float, device: str | None, overrides: Mapping[str, Any]) -> None:
    """Refuses, before anything is prepared, what no code would make a recipe of; arguments as for `choose_recipe`.

    Raises:
        UsageError: an override is wrong.
        PunaError: there is not even memory for the shortest rows.
    """
    try:
        _first_that_fits(at, 0, None, epochs, device, overrides)
    except UsageError:  # or right for longer rows and more steps
        _first_that_fits(at, MUCH_CODE, None, epochs, device, overrides)


def choose_recipe(at: "Places", epochs: float, device: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe that trains on the prepared code.

    Args:
        at: where the model and the prepared folder are.
        epochs: how often the code is seen.
        device: to train on; None: an accelerator, if there is one.
        overrides: dotted fields that are settled already.

    Raises:
        UsageError: an override is wrong.
        PunaError: none of `WAYS` fits; the message says by how much, and what would.
    """
    info = read_json(at.data / "dataset.json")
    options = info["settings"]["options"]
    length = options["fim_tokens"] if options.get("fim_rate") else None  # rows hold what was cut for infilling
    return _first_that_fits(at, info["tokens"], length, epochs, device, overrides)


def _first_that_fits(
    at: "Places", tokens: int, length: int | None, epochs: float, device: str | None, overrides: Mapping[str, Any]
) -> Recipe:
    config = load_config(at.model)
    length = length or row_length(config, tokens)
    place = pick_device(device)
    memory_gib = free_memory_bytes(place) / 2**30
    share = CPU_SHARE if place.type == "cpu" else 1.0
    content = _content(at, config, tokens, length, epochs, place.type if device is None else device)
    nearest = math.inf
    for way in WAYS:
        recipe = load_recipe(content, {**way, **overrides})
        name = "cpu" if place.type == "cpu" else None
        own = plan(recipe, memory_gib=share * memory_gib, device=name, layout=True)["own"]
        if own["fits"]:
            return recipe
        if "reason" in own:
            raise UsageError(f"{own['reason']}; puna adapt trains on one device")
        nearest = min(nearest, own["memory_gib"] / share)
    weights = config.parameter_count / 1e9
    raise PunaError(
        f"training all {weights:,.1f} billion weights of {at.model} takes {nearest:,.0f} GiB, and {place} has "
        f"{memory_gib:,.0f} GiB free: room for about {weights * memory_gib / nearest:,.1f} billion; take a smaller "
        "model, or several devices: `puna plan` and `puna launch`"
    )


def _content(at: "Places", config: ModelConfig, tokens: int, length: int, epochs: float, device: str) -> dict[str, Any]:
    batch_rows = max(1, min(LARGEST_BATCH_ROWS, round(tokens * epochs / length / STEPS)))
    steps = max(1, math.ceil(tokens * epochs / (batch_rows * length)))
    peak_lr = next(rate for weights, rate in PEAK_LR.items() if config.parameter_count >= weights)
    return {
        "model": str(at.model),
        "data": {"train": str(at.data), "valid": str(at.held_out)},
        "sequence_length": length,
        "run_dir": str(at.run),
        "steps": steps,
        "batch_tokens": batch_rows * length,
        "optimizer": {"peak_lr": peak_lr},
        "schedule": {"warmup_steps": min(steps, max(1, steps // 20))},
        "validation": {"every": max(1, steps // 10)},
        "checkpoint": {"every": max(50, steps // 5), "keep": 1},
        "device": device,
    }
