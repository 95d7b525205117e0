"""Devices: the machine is asked through torch.accelerator, and says what it can do."""

import ast
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from puna import devices
from puna.errors import UsageError
from puna.model import attention
from puna.parallel.mesh import rank_device

CPU = torch.device("cpu")


@pytest.fixture
def two_cards(monkeypatch):
    """A machine with two H200, as far as torch.accelerator tells."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: (device.index + 1) * 2**30)
    module = SimpleNamespace(get_device_name=lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)


@pytest.fixture
def cpu_info(monkeypatch):
    """Lets a test say what /proc/cpuinfo holds."""
    fields: dict[str, str] = {}
    monkeypatch.setattr(devices, "cpu_info", fields.get)
    return fields


def test_the_accelerator_is_picked_where_there_is_one(two_cards):
    assert devices.pick_device() == torch.device("cuda", 1)
    assert devices.pick_device("cuda:0") == torch.device("cuda", 0)
    assert devices.pick_device("cpu") == CPU
    assert devices.device_names() == ["cpu", "cuda:0", "cuda:1"]


def test_a_device_by_its_number_becomes_the_current_one(two_cards, monkeypatch):
    current: list[int] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert rank_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert rank_device(torch.device("cuda", 1)) == torch.device("cuda", 0)
    assert rank_device(CPU) == CPU
    assert current == [1, 0]


def test_the_cpu_is_picked_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.pick_device() == devices.pick_device("cpu") == CPU
    with pytest.raises(UsageError, match=r"device 'cuda' is not there; this machine has cpu \(see puna doctor\)"):
        devices.pick_device("cuda")


@pytest.mark.parametrize("name", ["cuda:2", "xpu"])
def test_a_device_that_is_not_there_is_refused(two_cards, name):
    with pytest.raises(UsageError, match=f"device '{name}' is not there; this machine has cpu, cuda:0, cuda:1"):
        devices.pick_device(name)


def test_a_device_that_torch_does_not_know_is_refused():
    with pytest.raises(UsageError, match="torch knows no device 'abacus'; this machine has cpu"):
        devices.pick_device("abacus")


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", 1307),
        ("Ascend910B2", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_published_peaks_are_found_by_the_words_of_a_name(name, teraflops):
    found = devices.published_peak_flops(name)
    assert found == (None if teraflops is None else teraflops * 1e12)


def test_an_accelerators_peak_is_its_data_sheets_for_bf16_and_unknown_for_fp32(two_cards):
    device = torch.device("cuda", 0)
    assert devices.device_name(device) == "NVIDIA H200"
    assert devices.peak_flops(device, torch.bfloat16) == 989e12
    assert devices.peak_flops(device, torch.float32) is None


def test_the_cpus_peak_is_measured_once_and_quickly_and_leaves_the_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    devices._measured_cpu_flops.cache_clear()
    started = time.process_time()
    peak = devices.peak_flops(CPU, torch.float32)
    assert (time.process_time() - started) / torch.get_num_threads() < 1.0
    assert torch.rand(2).tolist() == expected
    factor = torch.full((512, 512), 0.5)
    before = time.perf_counter()
    factor @ factor
    rate = 2 * 512**3 / (time.perf_counter() - before)
    assert 0.02 * rate < peak < 1e15
    assert devices.peak_flops(CPU, torch.float32) == peak


def test_memory_of_the_cpu_is_the_peak_of_the_process():
    # Apart, because a peak never falls: 300 MB that are gone again still count.
    code = (
        "import numpy as np; from types import SimpleNamespace; from puna.devices import memory_gib\n"
        "cpu = SimpleNamespace(type='cpu'); before = memory_gib(cpu)\n"
        "held = np.ones(300 * 2**17); del held\n"
        "print(before, memory_gib(cpu))"
    )
    before, after = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert 0.001 < before < 0.25
    assert 0.28 < after - before < 0.35


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept_once_it_is_asked_for():
    # 8 pieces of 40 MB are freed and taken again: what was given back to the system faults once more for each page.
    code = (
        "import resource, sys, ctypes; from puna.devices import keep_freed_memory\n"
        "sys.argv[1] == 'keep' and keep_freed_memory()\n"
        "def take():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    pieces = [bytearray(40_000_000) for _ in range(8)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "take(); print(take())"
    )
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", code, how], text=True)) for how in ("keep", "plain")
    }
    assert faults["plain"] > 50_000
    assert faults["keep"] < 0.2 * faults["plain"]


def test_memory_of_an_accelerator_is_its_own(two_cards):
    assert devices.memory_gib(torch.device("cuda", 1)) == 2.0


@pytest.mark.parametrize(
    ("field", "flags", "units"),
    [
        ("flags", "fpu sse avx2 avx512f avx512_bf16 amx_bf16 amx_tile", ["amx_bf16", "avx512_bf16"]),
        ("flags", "fpu sse avx2 avx512f", []),
        ("Features", "fp asimd bf16 i8mm", ["bf16"]),
        ("model name", "bf16", []),
    ],
)
def test_a_cpu_is_fast_at_bf16_only_with_units_for_it(cpu_info, field, flags, units):
    cpu_info[field] = flags
    assert devices.cpu_bf16_units() == units
    assert devices.has_fast_bf16(CPU) is bool(units)


@pytest.mark.parametrize(("capability", "is_fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_cuda_device_is_fast_at_bf16_from_its_eighth_generation_on(monkeypatch, capability, is_fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.has_fast_bf16(torch.device("cuda", 0)) is is_fast
    attention._varlen_attention.cache_clear()
    assert (attention._varlen_attention("cuda", torch.bfloat16, False) is not None) is is_fast
    attention._varlen_attention.cache_clear()
    assert devices.has_fast_bf16(torch.device("mps"))


@pytest.mark.parametrize(("capability", "has_it"), [((9, 0), False), ((10, 0), True), ((12, 0), False)])
def test_tensor_memory_is_that_of_data_centers_blackwells(monkeypatch, capability, has_it):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.has_tensor_memory(torch.device("cuda", 0)) is has_it
    assert not devices.has_tensor_memory(torch.device("cpu"))


@pytest.mark.parametrize(("hip", "knows"), [(None, True), ("6.4", False)])
def test_fp8_is_that_of_nvidia_and_not_that_of_amd(monkeypatch, hip, knows):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert devices.multiplies_fp8(torch.device("cuda", 0)) is knows


def test_the_cpu_has_a_name(cpu_info):
    cpu_info["model name"] = "Abacus 9000"
    assert devices.device_name(CPU) == "Abacus 9000"
    del cpu_info["model name"]
    assert devices.device_name(CPU)


def test_importing_devices_loads_no_torch():
    code = "import sys, puna.devices; puna.devices.cpu_bf16_units(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_nothing_but_devices_names_a_maker():
    """So that an accelerator of another name, like Ascend's `npu`, is taken wherever there is one."""
    package = Path(devices.__file__).parent
    excused = {
        "data/corpora/code.py",  # CUDA is one of the languages that are told apart
        "generate/engine/graphs.py",  # records CUDA's graphs, and is chosen by `takes_cuda_kernels`
    }
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        text = path.read_text(encoding="utf-8")
        if path == Path(devices.__file__) or name in excused or "\nimport triton\n" in text:
            continue  # kernels in Triton are chosen by `takes_cuda_kernels` too
        for node in ast.walk(ast.parse(text)):
            says = isinstance(node, ast.Constant) and str(node.value).partition(":")[0] in ("cuda", "npu")
            if says or (isinstance(node, ast.Attribute) and node.attr in ("cuda", "npu")):
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_an_accelerator_of_another_name_is_taken(monkeypatch):
    """As `torch-npu` makes one known: found through `torch.accelerator`, and no CUDA kernel is chosen for it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("npu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch, "device", lambda name, index=None: SimpleNamespace(type=name, index=index))
    assert devices.pick_device().type == "npu"
    assert devices.pick_device().index == 3
    assert devices.device_names() == ["cpu", *(f"npu:{i}" for i in range(8))]
    assert not devices.takes_cuda_kernels("npu")


@pytest.mark.parametrize("kind", [0, 1])
def test_a_control_groups_limit_counts_less_what_it_uses_but_for_files(tmp_path, monkeypatch, kind):
    group = replace(devices.CONTROL_GROUPS[kind], folder=tmp_path)
    monkeypatch.setattr(devices, "CONTROL_GROUPS", ())
    machine = devices.free_host_bytes()
    monkeypatch.setattr(devices, "CONTROL_GROUPS", (group,))
    assert devices.free_host_bytes() == pytest.approx(machine, rel=0.2)  # no such group
    (tmp_path / group.used).write_text("700000\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\n{group.files} 50000\nactive_file 3\n")
    (tmp_path / group.limit).write_text("max\n")
    assert devices.free_host_bytes() == pytest.approx(machine, rel=0.2)
    (tmp_path / group.limit).write_text("1000000\n")
    assert devices.free_host_bytes() == 350_000
    (tmp_path / group.used).write_text("1200000\n")
    assert devices.free_host_bytes() == 0


@pytest.mark.parametrize("missing", [None, "triton", "compiler", "headers"])
def test_kernels_in_triton_need_a_compiler_and_headers(monkeypatch, tmp_path, missing):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None if missing == "triton" else name)
    monkeypatch.setattr(devices.shutil, "which", lambda name: None if missing == "compiler" else f"/bin/{name}")
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda *_: str(tmp_path))
    if missing != "headers":
        (tmp_path / "Python.h").touch()
    assert devices.has_triton.__wrapped__() == (missing is None)
