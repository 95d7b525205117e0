"""Planning: will a recipe fit, how fast will it be, and under which layout, before anything is rented.

No weights are loaded and no torch: memory is counted from shapes (`memory`), time from a few physical constants
(`speed`), and layouts are tried one by one (`search`). The package is called like its function: `puna.plan(recipe)`.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.config import Recipe, load_recipe
from puna.devices import PROFILES, Profile, cpu_bf16_units
from puna.errors import UsageError
from puna.model.config import config_at_hand
from puna.twins import make_callable

if TYPE_CHECKING:
    from puna.plan.search import Judged, Search

make_callable(__name__)

#: Layouts shown.
BEST = 5


def plan(
    recipe: Recipe | str | Path | dict[str, Any],
    overrides: list[str] | dict[str, Any] | None = None,
    *,
    devices: int = 1,
    memory_gib: float | None = None,
    device: str | None = None,
    bandwidth: float | None = None,
    devices_per_node: int = 8,
    layout: bool = False,
    best: int = BEST,
) -> dict[str, Any]:
    """What a recipe takes and how fast it is on so many devices, and which layouts are best.

    Args:
        recipe: a recipe, a shipped recipe's name, a YAML file, or its content.
        overrides: dotted fields and their values, as for `load_recipe`.
        devices: how many there are.
        memory_gib: of each; None: the named device's.
        device: a name of `puna.devices.PROFILES`, for speed; None: the one of that memory.
        bandwidth: 1e9 bytes a second that a device sends to other nodes; None: the device's own.
        devices_per_node: devices that share a node.
        layout: judge the recipe's own layout only.
        best: how many layouts to return.

    Returns:
        {"fits", "own", "best", "nearest", "help", …}: layouts as {"overrides", "memory_gib", "memory", "moment",
        "host_memory", "seconds", "step_seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu", "days",
        …}; "own" is the recipe's, with "reason" where it is impossible. Memory is in GiB, of a device; "checkpoint_gib"
        is what one checkpoint takes on disk.

    Raises:
        UsageError: the recipe or an argument is wrong, or the model is not here.
        PunaError: the model's config.json cannot be read.
    """
    from puna.plan.search import Found, Search, weights_of
    from puna.plan.speed import Cluster

    recipe = load_recipe(recipe, overrides)
    if devices < 1 or devices_per_node < 1:
        raise UsageError(f"devices={devices} and devices_per_node={devices_per_node} must be 1 or more")
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise UsageError(f"memory_gib={memory_gib} must be above 0")
    name, profile = _profile(device, memory_gib)
    if bandwidth is not None:
        if not 0 < bandwidth < math.inf:
            raise UsageError(f"bandwidth={bandwidth} must be above 0")
        profile = replace(profile, node_link_rate=bandwidth)
    available = profile.memory_gib if memory_gib is None else memory_gib
    settled = recipe.model_copy(update={"precision": _precision(recipe.precision, name)})
    config, cluster = config_at_hand(recipe.model, recipe.start), Cluster(profile, devices_per_node)
    search = Search(settled, config, cluster, devices, available)
    own = _own(search)
    found = Found() if layout else search.run(best)
    shown = [_as_dict(each, search) for each in found.best]
    fits = own.get("fits", False) if layout else bool(shown)
    result = {
        "fits": fits,
        "device": name,
        "devices": devices,
        "memory_gib": available,
        "precision": settled.precision,
        "checkpoint_gib": weights_of(settled, config).checkpoint_bytes / 2**30,
        "checkpoints_kept": settled.checkpoint.keep,
        "own": own,
        "best": shown,
        "fitting": found.fitting,
        "too_large": found.too_large,
        "nearest": _as_dict(found.nearest, search) if found.nearest else None,
        "impossible": [{"layouts": n, "reason": reason} for n, reason in
                       sorted(found.impossible.values(), reverse=True)],
    }  # fmt: skip
    closest = found.nearest if not layout else search.judge(settled) if "memory" in own else None
    result["help"] = [] if fits or closest is None else _help(closest, search)
    return result


def _profile(device: str | None, memory_gib: float | None) -> tuple[str, Profile]:
    if device is None and memory_gib is None:
        raise UsageError(f"say --memory-gib, or --device: one of {', '.join(PROFILES)}")
    if device is None:
        accelerators = {name: profile for name, profile in PROFILES.items() if name != "cpu"}
        device = min(accelerators, key=lambda name: abs(accelerators[name].memory_gib - (memory_gib or 0)))
    if device not in PROFILES:
        raise UsageError(f"there is no device {device!r} in the table; there are {', '.join(PROFILES)}")
    return device, PROFILES[device]


def _precision(asked: str, device: str) -> str:
    if asked != "auto":
        return asked
    return "fp32" if device == "cpu" and not cpu_bf16_units() else "bf16"


def _own(search: "Search") -> dict[str, Any]:
    try:
        judged = search.judge(search.recipe)
    except UsageError as error:
        return {"fits": False, "reason": str(error)}
    return _as_dict(judged, search)


def _as_dict(judged: "Judged", search: "Search") -> dict[str, Any]:
    from puna.plan.host import host_memory
    from puna.plan.search import overrides_of

    fast = judged.speed
    return {
        "fits": search.fits(judged),
        "layout": str(judged.layout),
        "overrides": overrides_of(judged.recipe, search.recipe),
        "micro_batches": judged.layout.micro_batches,
        "memory_gib": judged.memory.gib,
        "memory": {name: size / 2**30 for name, size in judged.memory.rows.items()},
        "moment": judged.memory.moment,
        "host_memory": {name: size / 2**30 for name, size in host_memory(judged.case, judged.recompute).items()},
        "pp_rank": judged.memory.pp_rank,
        "step_seconds": fast.step_seconds,
        "seconds": fast.rows,
        "tokens_per_second": fast.tokens_per_second,
        "tokens_per_second_per_device": fast.tokens_per_second / judged.layout.devices,
        "mfu": fast.mfu,
        "days": fast.step_seconds * search.recipe.steps / 86_400,
    }


#: Overrides that may help where nothing fits.
REMEDIES = (
    "recompute=block",
    "recompute=offload",
    "recompute_layers=null",
    "micro_batch_rows=1",
    "optimizer.state_bits=8",
    "optimizer.in_backward=true",
    "precision=bf16-pure",
    "optimizer.state_bits=8 optimizer.in_backward=true",
    "precision=bf16-pure optimizer.state_bits=8 optimizer.in_backward=true",
    "precision=bf16-pure optimizer.state_bits=4 optimizer.in_backward=true",
)


def _help(closest: "Judged", search: "Search") -> list[dict[str, Any]]:
    """What each remedy, or twice as many devices, would make of the layout that comes nearest, if that is smaller."""
    from puna.plan.search import Search

    n = search.devices
    tried = [(words, n, words) for words in REMEDIES]
    tried.append((f"{2 * n} devices", 2 * n, f"parallel.dp_shard={2 * closest.layout.dp_shard}"))
    result = []
    for change, devices, overrides in tried:
        try:
            recipe = load_recipe(closest.recipe, overrides.split())
            there = Search(recipe, search.config, search.cluster, devices, search.memory_gib)
            judged = there.judge(recipe)
        except UsageError:
            continue
        if judged.memory.total < 0.99 * closest.memory.total:
            result.append({"change": change, "memory_gib": judged.memory.gib, "fits": there.fits(judged)})
    return result
