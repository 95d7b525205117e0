"""What computes: which device there is, what it is called, how fast it is at best, and how much memory is in use.

Everything goes through `torch.accelerator`, so CUDA, Ascend (with torch-npu installed) and whatever torch learns next
are the same code, and the CPU is the device of last resort. torch is imported inside the functions: asking the CPU
about itself needs none.
"""

import ctypes
import functools
import importlib.util
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from puna.errors import UsageError

if TYPE_CHECKING:
    import torch

#: Words of a device's name -> its published peak for dense bf16 (and fp16) products with fp32 sums, in FLOP/s; the
#: first row whose words are all in the name counts. None: unknown, because variants share the name.
#: Source: the makers' data sheets; where they print the rate with sparsity, half of it. The Ascend 910B is not in the
#: list: sources disagree (256e12 and 320e12).
PEAK_FLOPS: list[tuple[tuple[str, ...], float | None]] = [
    (("B200",), 2250e12),
    (("GH200",), 989e12),
    (("H200", "NVL"), 836e12),
    (("H200",), 989e12),
    (("H100", "PCIE"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("H800",), 989e12),
    (("H20",), 148e12),
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("L40S",), 362e12),
    (("L40",), 181e12),
    (("L4",), 121e12),
    (("A10",), 125e12),
    (("A6000",), 155e12),
    (("4090", "LAPTOP"), None),
    (("4090", "D"), None),
    (("4090",), 165e12),
    (("3090",), 71e12),
    (("MI300X",), 1307e12),
]


@dataclass(frozen=True)
class Profile:
    """A device as plans see it; rates in 1e9 bytes a second.

    Attributes:
        name: what its maker calls it, by which its peak is found in PEAK_FLOPS.
        fp32_flops: FLOP/s of fp32 products at most; not of TF32, which is never turned on.
        memory_gib: what torch can allocate of.
        memory_rate: of its own memory.
        link_rate: one direction, to the other devices of its node, all together.
        node_link_rate: one direction, its share of what leaves the node.
        host_rate: one direction, to the host's memory.
        matmul_share: of the peak that long products reach in a training run: of bf16, and taken for fp32 too.
        attention_share: of the peak that flash attention reaches, forward and backward together.
        has_update_kernel: whether the optimizer's update is one kernel there, else a dozen operations.
        assumed_flops: its peak where PEAK_FLOPS has none.
    """

    name: str
    fp32_flops: float
    memory_gib: float
    memory_rate: float
    link_rate: float
    node_link_rate: float
    host_rate: float
    matmul_share: float
    attention_share: float
    has_update_kernel: bool = True
    assumed_flops: float = 0.0

    @functools.cached_property
    def peak_flops(self) -> float:
        """FLOP/s of bf16 products at most."""
        return published_peak_flops(self.name) or self.assumed_flops


#: Short name -> profile. Memory and rates: the makers' data sheets (NVLink and PCIe: half of "bidirectional"; between
#: nodes: one 400 Gbit/s port a device, 200 for A100 and 910B). Shares: h200 as benchmarks/gpu.sh measured them, whose
#: steps they meet within 5 %; h100 attends like it, and its products meet most of the published runs in
#: benchmarks/plan.py within a quarter, as a100-80's do. a100-40 is as a100-80; h100-pcie is a guess. Ascend 910B: the
#: lower of the peaks that sources give (256e12 and 320e12), for fp32 a guess, a quarter of it, and guessed shares that
#: meet its two runs there within a quarter. The CPU: two cores of AVX2, fp32, as `puna doctor` measured them.
PROFILES: dict[str, Profile] = {
    "h200": Profile("NVIDIA H200", 67e12, 139.8, 4800, 450, 50, 55, 0.64, 0.50),
    "h100": Profile("NVIDIA H100 80GB HBM3", 67e12, 79.1, 3350, 450, 50, 55, 0.56, 0.50),
    "h100-pcie": Profile("NVIDIA H100 PCIe", 51e12, 79.1, 2000, 55, 25, 55, 0.56, 0.50),
    "a100-80": Profile("NVIDIA A100-SXM4-80GB", 19.5e12, 79.1, 2039, 300, 25, 25, 0.80, 0.55),
    "a100-40": Profile("NVIDIA A100-SXM4-40GB", 19.5e12, 39.4, 1555, 300, 25, 25, 0.80, 0.55),
    "ascend-910b": Profile(
        "Ascend 910B", 64e12, 61.0, 1600, 196, 25, 25, 0.70, 0.45, has_update_kernel=False, assumed_flops=256e12
    ),
    "cpu": Profile("CPU", 0.2e12, 16.0, 20, 5, 1, 10, 0.80, 0.30, has_update_kernel=False, assumed_flops=0.2e12),
}

#: Flags in /proc/cpuinfo of units that multiply bf16: Intel and AMD, Arm.
BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}

#: Numbers of glibc's settings: the free end of its heap that it gives back, and how many pieces may lie outside of it.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class _ControlGroup:
    """Where a container is told how much memory it may use, and how much it does.

    Attributes:
        files: the row of memory.stat that counts what the kernel can drop.
    """

    folder: Path
    limit: str
    used: str
    files: str

    def limit_bytes(self) -> int:
        """How much it may use; sys.maxsize: it is not there, or not limited."""
        try:
            text = (self.folder / self.limit).read_text(encoding="ascii").strip()
        except OSError:
            return sys.maxsize
        return int(text) if text.isdigit() else sys.maxsize


#: Of the second and the first version, as containers see them.
CONTROL_GROUPS = (
    _ControlGroup(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    _ControlGroup(
        Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    ),
)

#: How long the CPU's rate is measured.
MEASURE_SECONDS = 0.25


def pick_device(name: str | None = None) -> "torch.device":
    """The device to compute on.

    Args:
        name: e.g. "cpu", "cuda", "cuda:1", "npu"; None: this machine's accelerator, or the CPU where there is none.

    Raises:
        UsageError: torch does not know such a device, or this machine has none.
    """
    import torch

    if name is None:
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        name = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"torch knows no device {name!r}; this machine has {', '.join(device_names())}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type not in {name.partition(":")[0] for name in device_names()}:
        raise UsageError(
            f"device {name!r} is not there; this machine has {', '.join(device_names())} (see puna doctor)"
        )
    if device.index is None:
        return torch.device(device.type, torch.accelerator.current_device_index())
    if device.index >= torch.accelerator.device_count():
        raise UsageError(f"device {name!r} is not there; this machine has {', '.join(device_names())}")
    return device


def device_names() -> list[str]:
    """What `pick_device` takes on this machine: "cpu", and one name an accelerator."""
    import torch

    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    return ["cpu", *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]


def device_name(device: "torch.device") -> str:
    """What its maker calls it, e.g. "NVIDIA H200"."""
    if device.type == "cpu":
        return cpu_name()
    import torch

    return torch.get_device_module(device).get_device_name(device)


def takes_cuda_kernels(device_type: str) -> bool:
    """Whether kernels written for CUDA run on devices of a type, e.g. of "cuda" but not of "npu"."""
    return device_type == "cuda"


@functools.cache
def has_triton() -> bool:
    """Whether kernels written in Triton can be built: it comes with torch's builds for CUDA on Linux.

    What starts them is C: Triton compiles it with the machine's compiler and Python's headers, which many containers
    do not have.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return importlib.util.find_spec("triton") is not None and compiler is not None and headers.exists()


def multiplies_fp8(device: "torch.device") -> bool:
    """Whether a device multiplies 8-bit floating-point numbers (e4m3) that are scaled by the row."""
    import torch

    has_them = takes_cuda_kernels(device.type) and torch.version.hip is None  # AMD's e4m3 has other numbers
    return has_them and torch.cuda.get_device_capability(device) >= (8, 9)


def has_tensor_memory(device: "torch.device") -> bool:
    """Whether a device keeps sums of large products in a memory of their own: NVIDIA's for data centers since B200."""
    import torch

    is_nvidia = takes_cuda_kernels(device.type) and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device)[0] in (10, 11)


#: Of every Triton kernel: that it adds products without rounding them first, which from Triton 3.10 on it must be told.
FUSED = {"enable_fp_fusion": True}


def early_launch(device: "torch.device") -> dict[str, bool]:
    """Of a Triton kernel: that it starts while the kernel before it ends, where a device can (NVIDIA's since H100).

    Such a kernel is told IS_EARLY. It says first that the next may start (`gdc_launch_dependents`), and before it reads
    or writes anything but weights it waits until all kernels before it have ended (`gdc_wait`).
    """
    import torch

    is_nvidia = takes_cuda_kernels(device.type) and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"IS_EARLY": True, "launch_pdl": True}
    return {"IS_EARLY": False}


def peak_flops(device: "torch.device", dtype: "torch.dtype") -> float | None:
    """The most floating-point operations a second that matrix products of `dtype` can reach; None: nobody knows.

    Accelerators: the published peak for bf16 and fp16, None for other types. The CPU, for which nothing is published:
    the best of a few square products, measured once a process.
    """
    import torch

    if device.type == "cpu":
        return _measured_cpu_flops(dtype, torch.get_num_threads())
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return published_peak_flops(device_name(device))


def published_peak_flops(name: str) -> float | None:
    """The row of PEAK_FLOPS for a device's name; None where there is none."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    return next((flops for row, flops in PEAK_FLOPS if words.issuperset(row)), None)


def memory_gib(device: "torch.device") -> float:
    """The most memory that was in use at a time, in GiB: tensors on an accelerator, this whole process on the CPU."""
    if device.type == "cpu":
        return _peak_process_bytes() / 2**30
    import torch

    return torch.accelerator.max_memory_allocated(device) / 2**30


def free_memory_bytes(device: "torch.device") -> int:
    """What could still be allocated: of an accelerator's memory and torch's reserve of it, or of this machine's."""
    if device.type == "cpu":
        return free_host_bytes()
    import torch

    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):  # it shares the machine's
        return free_host_bytes()
    reserve = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(module.mem_get_info(device)[0]) + reserve


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, *(group.limit_bytes() for group in CONTROL_GROUPS))


def free_host_bytes() -> int:
    """What could still be allocated of this machine's memory, or of the control group's where that is less.

    Of the group's pages those count as free that hold files, which the kernel drops when it needs room.
    """
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    free = int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(free, *map(_free_bytes_of, CONTROL_GROUPS), sys.maxsize)


def _free_bytes_of(group: _ControlGroup) -> int:
    limit = group.limit_bytes()
    if limit == sys.maxsize:
        return limit
    try:
        used, rows = ((group.folder / name).read_text(encoding="ascii") for name in (group.used, "memory.stat"))
    except OSError:
        return sys.maxsize
    files = dict(row.split() for row in rows.splitlines()).get(group.files, "0")
    return max(0, limit - int(used) + int(files))


def page_locked(size_bytes: float) -> int:
    """What torch's allocator of page-locked host memory takes for so many bytes: the next power of two.

    Source: torch's `CachingHostAllocator.h`.
    """
    return 1 << (math.ceil(size_bytes) - 1).bit_length() if size_bytes > 0 else 0


def page_locked_like(x: "torch.Tensor") -> "torch.Tensor":
    """Page-locked host memory for the values of a tensor, unfilled: copies to and from it wait for nobody.

    Raises:
        MemoryError: the system gives no more; torch's error is that of a library's, and says nothing of the host.
    """
    import torch

    try:
        return torch.empty_like(x, device="cpu", pin_memory=True)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise MemoryError(f"no page-locked memory for {x.nbytes:,} bytes") from error


def has_fast_bf16(device: "torch.device") -> bool:
    """Whether bf16 products are faster than fp32 ones: on CPUs with units for them, and on accelerators.

    A CPU without such units multiplies bf16 up to a hundred times slower than fp32. Of CUDA devices, those before
    compute capability 8.0 (V100, T4) have none, and flash attention does not know them either.
    """
    if takes_cuda_kernels(device.type):
        import torch

        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type != "cpu" or bool(cpu_bf16_units())


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed, for this process to take again, where it is glibc.

    It gives back whatever is larger than 32 MB, and a free end of its heap, at once. A training step on a CPU frees and
    takes a few hundred MB many times: fresh pages took a twentieth of the step of one process, and a third where two
    share the weights, whose buffers hold all gradients of a unit. In return such a process holds up to four tenths more
    memory, which grows over its first tens of steps, until every piece finds a place that another left.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_MMAP_MAX, 0)  # what lies outside of the heap, as pieces above 32 MB do, is given back once it is freed


def cpu_bf16_units() -> list[str]:
    """Instruction sets of the CPU that multiply bf16; empty where there are none, or where Linux does not say."""
    flags = cpu_info("flags") or cpu_info("Features") or ""
    return sorted(BF16_FLAGS & set(flags.split()))


def has_int8_units() -> bool:
    """Whether the CPU sums products of int8 and uint8 in 32 bits; older ones pass through 16, which they overflow."""
    return "avx512_vnni" in (cpu_info("flags") or "").split()


def cpu_name() -> str:
    """What its maker calls this CPU, as far as the system tells."""
    return cpu_info("model name") or platform.processor() or platform.machine()


@functools.cache
def cpu_info(field: str) -> str | None:
    """What Linux says of the CPU in a field of /proc/cpuinfo, e.g. "flags"; None: nothing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), None)


def cpu_cores() -> int:
    """The cores that this process may use, where the system says; else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package_command(commands: Mapping[str, str]) -> str | None:
    """The command that installs something on this machine; None: it has none of these package managers.

    Args:
        commands: package manager -> the command for root.
    """
    command = next((command for manager, command in commands.items() if shutil.which(manager)), None)
    return command if command is None or os.geteuid() == 0 else f"sudo {command}"


@functools.cache
def _measured_cpu_flops(dtype: "torch.dtype", n_threads: int) -> float:
    """FLOP/s of the best of square products of growing size; `n_threads` is there because the rate depends on it."""
    import torch

    best, size = 0.0, 256
    with torch.inference_mode():
        factor = torch.full((size, size), 0.5, dtype=dtype)  # not random numbers: that would disturb the seed
        factor @ factor  # the first product starts the threads
        started = time.perf_counter()
        while time.perf_counter() - started < MEASURE_SECONDS:
            before = time.perf_counter()
            factor @ factor
            seconds = time.perf_counter() - before
            best = max(best, 2 * size**3 / seconds)
            if seconds < MEASURE_SECONDS / 32:
                size *= 2
                factor = torch.full((size, size), 0.5, dtype=dtype)
    return best


def _peak_process_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
