"""`puna plan`: will a recipe fit, how fast will it be, and under which layout."""

import json
import shlex
from typing import Annotated, Any

import typer

from puna.cli import app
from puna.cli.train import Overrides, Recipe


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(help="How many devices there are.")] = 1,
    memory_gib: Annotated[float | None, typer.Option(help="Memory of each; else that of --device.")] = None,
    device: Annotated[str | None, typer.Option(help="Which they are, e.g. h200; else of that memory.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s from a device to other nodes; else its usual.")] = None,
    devices_per_node: Annotated[int, typer.Option(help="Devices that share a node.")] = 8,
    layout: Annotated[bool, typer.Option("--layout", help="Judge the recipe's own layout only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say whether RECIPE fits, and which layouts are fastest.

    Memory and time are computed, nothing is run. Exit code 1 if no layout fits.
    """
    from puna.parallel.start import words_to_start
    from puna.plan import plan as plan_recipe

    result = plan_recipe(
        recipe, overrides, devices=devices, memory_gib=memory_gib, device=device, bandwidth=bandwidth,
        devices_per_node=devices_per_node, layout=layout,
    )  # fmt: skip
    if as_json:
        print(json.dumps(result))
    else:
        start, how_many = words_to_start(devices, devices_per_node)
        for line in _lines(result, [recipe, *(overrides or [])], start, how_many):
            print(line)
    raise typer.Exit(0 if result["fits"] else 1)


def _lines(result: dict[str, Any], recipe: list[str], start: str, how_many: str) -> list[str]:
    of = f"{result['devices']:,} x {result['device']} of {result['memory_gib']:,.1f} GiB"
    lines = [f"{shlex.join(recipe)} on {of}, {result['precision']}", ""]
    lines += _own(result["own"], result["memory_gib"])
    if result["best"]:
        lines += ["", f"{result['fitting']:,} layouts fit; the fastest:", ""]
        lines += [
            f"  {_summary(each)}\n    {start} {_changed(recipe, each['overrides'])}{how_many}"
            for each in result["best"]
        ]
        lines += ["", f"the first of them ({result['best'][0]['layout']}) in full:", *_tables(result["best"][0])]
    lines += ["", f"a checkpoint takes {result['checkpoint_gib']:,.1f} GiB of disk; the newest "
              f"{result['checkpoints_kept']} are kept while the next is written (checkpoint.keep)"]  # fmt: skip
    lines += _misfits(result)
    return lines


def _changed(recipe: list[str], overrides: list[str]) -> str:
    """A recipe with the overrides that it came with, and others, which take the place of those of the same field."""
    fields = {override.partition("=")[0] for override in overrides}
    return " ".join([shlex.join(word for word in recipe if word.partition("=")[0] not in fields), *overrides])


def _own(own: dict[str, Any], memory_gib: float) -> list[str]:
    if "reason" in own:
        return [f"the recipe's own layout is impossible: {own['reason']}"]
    verdict = "fits" if own["fits"] else f"does not fit, by {own['memory_gib'] - memory_gib:,.1f} GiB"
    return [f"the recipe's own layout ({own['layout']}) {verdict}: {_summary(own)}", *_tables(own)]


def _summary(each: dict[str, Any]) -> str:
    mfu = ", ".join(f"{share:.1%} {convention}" for convention, share in each["mfu"].items())
    return (
        f"{each['memory_gib']:,.1f} GiB, {each['tokens_per_second']:,.0f} tokens/s "
        f"({each['tokens_per_second_per_device']:,.0f} a device), MFU {mfu}, {each['step_seconds']:,.2f} s a step, "
        f"{_days(each['days'])}"
    )


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:,.1f} hours"


def _tables(each: dict[str, Any]) -> list[str]:
    """Memory beside time, the rows that are not nothing."""
    left = [f"{name:<22} {gib:9.2f} GiB" for name, gib in each["memory"].items() if gib >= 0.005]
    left.append(f"{'sum, at ' + each['moment']:<22} {each['memory_gib']:9.2f} GiB")
    right = [f"{name:<17} {seconds:9.3f} s" for name, seconds in each["seconds"].items() if seconds >= 0.0005]
    right.append(f"{'sum':<17} {each['step_seconds']:9.3f} s")
    width = max(map(len, left))
    height = max(len(left), len(right))
    pairs = zip(left + [""] * (height - len(left)), right + [""] * (height - len(right)), strict=True)
    return [*(f"    {one:<{width}}    {other}".rstrip() for one, other in pairs), *_host(each["host_memory"])]


def _host(rows: dict[str, float]) -> list[str]:
    """What the host of a device needs, and what it may lack."""
    from puna.plan.host import COPIES

    needed = [f"{gib:,.2f} GiB of {name}" for name, gib in rows.items() if gib >= 0.005 and name != COPIES]
    lines = [f"    host memory a device: {' and '.join(needed)}"] if needed else []
    if rows[COPIES] >= 0.005:
        lines.append(f"    {COPIES}: {rows[COPIES]:,.2f} GiB of host memory a device, or training waits for each")
    return lines


def _misfits(result: dict[str, Any]) -> list[str]:
    lines = []
    if (nearest := result["nearest"]) is not None:
        lines.append(
            f"{result['too_large']:,} layouts need more than {result['memory_gib']:,.1f} GiB, the nearest "
            f"{nearest['memory_gib']:,.1f} GiB: {' '.join(nearest['overrides']) or 'the recipe as it is'}"
        )
    lines += [f"{each['layouts']:,} are impossible: {each['reason']}" for each in result["impossible"]]
    if result["help"]:
        lines.append("what would help the nearest:" if nearest is not None else "what would help:")
        lines += [
            f"    {each['change']}: {each['memory_gib']:,.1f} GiB{', fits' if each['fits'] else ''}"
            for each in result["help"]
        ]
    return ["", *lines] if lines else []
