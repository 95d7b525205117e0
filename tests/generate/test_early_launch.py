"""Kernels that start while the one before them ends, compiled for an H100: they wait before they read or write."""

import re
from typing import Any

import pytest
import torch

from puna.devices import FUSED, early_launch
from tests.triton_interpreter import needs_triton

MULTIPLIED = {
    **dict.fromkeys(("x", "norm", "first", "second", "residual", "out"), "*bf16"),
    **dict.fromkeys(("row_scales", "third", "first_scales", "second_scales", "third_scales")),
    "eps": "fp32",
}

#: Kernel -> types of its arguments (None: it is not given; i32 where nothing is said), and what it is compiled for.
KERNELS: dict[str, tuple[dict[str, str | None], dict[str, Any]]] = {
    "puna.quantized.few_rows_kernel._multiply": (
        MULTIPLIED,
        {"ROWS": 16, "OUTPUTS": 32, "DEPTH": 128, "IS_GATED": False, "LINES": 8, "LINE": 64},
    ),
    "puna.quantized.rows_kernel._rows": (
        {"x": "*bf16", "norm": "*bf16", "out": "*fp8e4nv", "scales": "*fp32", "eps": "fp32"},
        {"CHANNELS": 4096},
    ),
    "puna.generate.engine.rotary_kernel._rotate": (
        {**dict.fromkeys(("heads", "keys", "values"), "*bf16"), "cos": "*fp32", "sin": "*fp32", "slots": "*i64"},
        {"HALF": 64, "CHANNELS": 64},
    ),
    "puna.generate.engine.paged_attention_kernel._attend": (
        {
            **dict.fromkeys(("q", "keys", "values", "out"), "*bf16"),
            **dict.fromkeys(("parts", "tops", "totals"), "*fp32"),
            **dict.fromkeys(("block_tables", "lengths", "firsts"), "*i32"),
            **dict.fromkeys(("key_scales", "value_scales")),
            "scale": "fp32",
        },
        {
            "GROUPS": 1,
            "HEADS": 1,
            "ROWS": 16,
            "WIDTH": 128,
            "CHANNELS": 128,
            "BLOCK_SIZE": 32,
            "TILE": 64,
            "IS_SPLIT": True,
        },
    ),
    "puna.generate.engine.paged_attention_kernel._join": (
        {**dict.fromkeys(("parts", "tops", "totals"), "*fp32"), "out": "*bf16"},
        {"WIDTH": 128, "CHANNELS": 128, "SPLITS": 8},
    ),
}


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_it_waits_before_it_reads_or_writes(name: str) -> None:
    instructions = _instructions(name)
    wait = instructions.index("griddepcontrol.wait")
    touching = [
        at for at, each in enumerate(instructions) if re.match(r"(ld|st|cp\.async|red|atom)\.(\w+\.)*global", each)
    ]
    assert touching, "it was told apart from other instructions"
    assert instructions.index("griddepcontrol.launch_dependents") < wait < min(touching)
    fetched = [at for at, each in enumerate(instructions) if each.startswith("prefetch")]
    assert bool(fetched) == name.endswith("_multiply")
    assert all(at < wait for at in fetched), "weights are all that it may look at before"


def _instructions(name: str) -> list[str]:
    """Of a kernel in PTX, compiled for an H100."""
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module, _, kernel = name.rpartition(".")
    function, (types, constants) = getattr(import_module(module), kernel), KERNELS[name]
    constants = {**constants, **{key: None for key, value in types.items() if value is None}, "IS_EARLY": True}
    signature = {key: "constexpr" if key in constants else types.get(key, "i32") for key in function.arg_names}
    source = ASTSource(function, signature, constants, {})
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True, **FUSED}).asm["ptx"]
    return re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.:]+)", ptx, re.MULTILINE)


def test_a_cpu_starts_nothing_early() -> None:
    assert early_launch(torch.device("cpu")) == {"IS_EARLY": False}
