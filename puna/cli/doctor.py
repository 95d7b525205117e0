"""`puna doctor`: what this machine has, and what is missing, with the command that mends it.

Each check asks the machine and answers with findings. A finding is "ok", a "note" (something optional is missing, or
works but slowly) or "missing" (puna needs it); the exit code is 1 if anything is missing.
"""

import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from puna.cli import app
from puna.devices import package_command
from puna.errors import PunaError
from puna.native import INSTALL_COMPILER, INSTALL_FOR_TRITON, compiler, cpp_compiler


@dataclass(frozen=True)
class Finding:
    """What a check found, and how to mend it where it is not "ok"."""

    name: str
    state: str
    found: str
    remedy: str | None = None


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Say what this machine has and lacks, and what mends it."""
    findings = [finding for check in _CHECKS for finding in check()]
    n_missing = sum(finding.state == "missing" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not n_missing, "findings": [asdict(finding) for finding in findings]}))
    else:
        _print(findings, n_missing)
    raise typer.Exit(1 if n_missing else 0)


def _print(findings: list[Finding], n_missing: int) -> None:
    from rich.console import Console
    from rich.text import Text

    width = None if sys.stdout.isatty() else 100_000  # in a pipe lines stay whole
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    for finding in findings:
        console.print(
            Text.assemble((f"{finding.state:<8} ", _COLOURS[finding.state]), f"{finding.name}: {finding.found}")
        )
        if finding.remedy:
            console.print(Text(f"         {finding.remedy}", style="bold"))
    console.print(
        f"\n{n_missing} required things are missing" if n_missing else "\nnothing that is required is missing"
    )


_COLOURS = {"ok": "green", "note": "yellow", "missing": "red"}

#: Oldest Python that puna runs on.
OLDEST_PYTHON = (3, 11)

#: Extra of the package -> what it is for.
EXTRAS = {
    "near-duplicates": "puna prepare --near-duplicates",
    "hub": "models by their Hugging Face hub id",
    "tensorboard": "TensorBoard beside metrics.jsonl",
}

#: Free disk below which there is a note: less than a checkpoint of the smallest Code Llama.
ENOUGH_DISK_GIB = 40


def _python() -> Iterator[Finding]:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] >= OLDEST_PYTHON:
        yield Finding("Python", "ok", found)
    else:
        yield Finding("Python", "missing", f"{found}, too old", f"install Python {oldest} or newer")


def _packages() -> Iterator[Finding]:
    """The packages that puna names in its own metadata: required ones, and its extras but the developers'."""
    try:
        requirements = metadata.requires("puna") or []
    except metadata.PackageNotFoundError:
        yield Finding("puna", "missing", "not installed, only run from its folder", "pip install -e .")
        return
    yield Finding("puna", "ok", f"{metadata.version('puna')} at {Path(__file__).parents[1]}")
    for requirement in requirements:
        wanted, _, condition = requirement.partition(";")
        extra = re.search(r"""extra == ["'](.+?)["']""", condition)
        if extra is None:
            yield _package(wanted.strip(), None)
        elif extra[1] in EXTRAS:
            yield _package(wanted.strip(), extra[1])


def _package(wanted: str, extra: str | None) -> Finding:
    name, _, oldest = wanted.partition(">=")
    absent, purpose = ("missing", "") if extra is None else ("note", f"; only for {EXTRAS[extra]}")
    remedy = f"pip install '{wanted}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, absent, f"not installed{purpose}", remedy)
    if _numbers(version) < _numbers(oldest):
        return Finding(name, absent, f"{version} is too old; {oldest} or newer is needed{purpose}", remedy)
    return Finding(name, "ok", version)


def _numbers(version: str) -> list[int]:
    leading = re.match(r"[\d.]*", version)
    return [int(number) for number in leading[0].split(".") if number] if leading else []


def _processor() -> Iterator[Finding]:
    from puna.devices import cpu_bf16_units, cpu_cores, cpu_name, memory_bytes

    found = f"{cpu_name()}, {cpu_cores()} cores, {memory_bytes() / 2**30:.0f} GiB of memory"
    yield Finding("processor", "ok", found)
    units = cpu_bf16_units()
    if units:
        yield Finding("bf16 on the processor", "ok", ", ".join(units))
    else:
        found = "no units for it, so products are far slower than in fp32"
        yield Finding("bf16 on the processor", "note", found, "on the processor, train and generate in fp32")


def _devices() -> Iterator[Finding]:
    try:
        import torch

        from puna.devices import device_name, device_names, has_triton, peak_flops, takes_cuda_kernels
    except (ImportError, OSError) as error:
        yield Finding("devices", "missing", f"torch does not load: {error}", "pip install --force-reinstall torch")
        return
    names = device_names()
    for name in names[1:]:
        device = torch.device(name)
        _, total = torch.accelerator.get_memory_info(device)
        peak = peak_flops(device, torch.bfloat16)
        rate = f"{peak / 1e12:,.0f} TFLOP/s of bf16 published" if peak else "its peak is unknown to puna"
        yield Finding(name, "ok", f"{device_name(device)}, {total / 2**30:.0f} GiB, {rate}")
    if any(takes_cuda_kernels(torch.device(name).type) for name in names[1:]) and not has_triton():
        found = "none, so models train and generate more slowly: they need Triton, gcc and Python's headers"
        yield Finding("kernels of accelerators", "note", found, package_command(INSTALL_FOR_TRITON))
    if not names[1:]:
        measured = (peak_flops(torch.device("cpu"), torch.float32) or 0) / 1e9
        yield Finding("accelerator", "ok", f"none: the processor computes, {measured:,.0f} GFLOP/s of fp32 measured")


def _compiler() -> Iterator[Finding]:
    if (found := cpp_compiler()) is not None:
        yield Finding("C++ compiler", "ok", found)
    else:
        yield Finding("C++ compiler", "note", "none; only compile=true needs it", package_command(INSTALL_COMPILER))


def _kernels() -> Iterator[Finding]:
    """What computes on the processor: C files that are built at first use, and so here."""
    program = compiler()
    if program is None:
        found = "none; with one, models generate faster on processors with AVX-512, and train faster in bf16"
        yield Finding("C compiler", "note", found, package_command(INSTALL_COMPILER))
        return
    try:
        import puna.model.layer_kernel
        import puna.quantized.kernel
    except (ImportError, OSError):  # torch does not load, which is said elsewhere
        yield Finding("C compiler", "ok", program)
        return
    kernels = {"bf16": puna.model.layer_kernel.kernel(), "int8": puna.quantized.kernel.kernel()}
    kernels["int4"] = kernels["int8"]
    made = ", ".join(name for name, kernel in kernels.items() if kernel is not None)
    uses = f"makes kernels for models in {made}" if made else "makes no kernel for this processor, so torch multiplies"
    yield Finding("C compiler", "ok", f"{program} {uses}")


def _sandbox() -> Iterator[Finding]:
    from puna.evaluate.sandbox import Sandbox
    from puna.evaluate.walls import install_command

    only = "only puna evaluate humaneval needs it"
    if shutil.which("bwrap") is None:
        yield Finding("sandbox", "note", f"no bubblewrap; {only}", install_command())
        return
    try:
        with Sandbox(workers=1) as sandbox:
            yield Finding("sandbox", "ok", sandbox.mechanism)
    except PunaError as error:
        found, _, remedy = str(error).partition("\n")
        yield Finding("sandbox", "note", f"{found}; {only}", remedy or None)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / 2**30
    found = f"{free:,.0f} GiB free at {Path.cwd()}"
    if free >= ENOUGH_DISK_GIB:
        yield Finding("disk", "ok", found)
    else:
        remedy = "a 7B model and its checkpoints need more; point run_dir at a larger disk"
        yield Finding("disk", "note", found, remedy)


_CHECKS = (_python, _packages, _processor, _devices, _compiler, _kernels, _sandbox, _disk)
