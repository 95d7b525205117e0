"""What `puna plan` says of runs that others have published, beside what they measured.

    python benchmarks/plan.py

Each row is a published run. What its source says of layout, recomputation and compilation is taken from there; of what
it does not say (mostly rows at once, and recomputation), plan takes the fastest that fits. Where a source gives MFU
alone, its tokens a second are those of the full convention. Runs in fp8, with LoRA or with what else puna has not are
listed, and not predicted. torchtitan's "selective" recomputes every second product, compiled or not; of compiled layers
puna's recomputes nothing. Some shares in `puna.devices` were fitted to these runs, not to nanotron's: this says how
well a few constants explain them, more than how well a new run is foretold.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

from record import arguments, record

from puna.config import Recipe, load_recipe
from puna.devices import PROFILES
from puna.errors import UsageError
from puna.model.config import ModelConfig, preset
from puna.model.flops import flops_per_token
from puna.plan.case import RECOMPUTE
from puna.plan.search import Judged, Search
from puna.plan.speed import Cluster

#: A prediction that is further off than this share is a miss.
GOAL = 0.25

#: Share of the peak that FlashAttention 2 reaches on an H200, forward and backward (0.26 to 0.32 by
#: results/gpu_attention.json): most of the runs on H100 and H200 attended with it. puna's is faster there.
FLASH_2, HOPPER = 0.28, ("h100", "h200")

#: Rows at once that are tried where the source does not say, and tokens of a device and step.
ROWS_AT_ONCE, TOKENS_A_STEP = (1, 2, 4, 8, 16), 65_536


def _shape(layers: int, width: int, feed_forward: int, heads: int, kv_heads: int, vocabulary: int) -> ModelConfig:
    return replace(
        preset("codellama-7b"), num_hidden_layers=layers, hidden_size=width, intermediate_size=feed_forward,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width // heads, vocab_size=vocabulary,
        max_position_embeddings=131_072,
    )  # fmt: skip


def _mpt(layers: int, width: int) -> ModelConfig:
    """MPT, whose MLP of width 4D has no gate: one with a gate and as many weights."""
    return _shape(layers, width, 8 * width // 3, width // 128, width // 128, 50_368)


#: Shapes of the models that are predicted, as their makers publish them.
MODELS: dict[str, ModelConfig] = {
    "Llama-3-8B": _shape(32, 4096, 14_336, 32, 8, 128_256),
    "Llama-3-70B": _shape(80, 8192, 28_672, 64, 8, 128_256),
    "Code Llama 34B": preset("codellama-34b"),
    "14.8B": _shape(40, 5120, 17_408, 40, 8, 151_936),  # of Qwen3-14B, which has as many weights; the source names none
    "Qwen2.5-7B": _shape(28, 3584, 18_944, 28, 4, 152_064),
    "Llama, 8.86B": _shape(32, 4096, 14_336, 32, 32, 131_072),
    "Llama, 80B": _shape(80, 8192, 28_672, 64, 64, 131_072),
    "MPT-7B": _mpt(32, 4096),
    "MPT-13B": _mpt(40, 5120),
    "MPT-30B": _mpt(48, 7168),
    "MPT-70B": _mpt(80, 8192),
}


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
        tokens_per_second: of a device; None: the source gives `mfu`.
        recompute: None: the source does not say.
        rows: at once; None: it does not say.
        rows_a_step: of a device; None: as many as make TOKENS_A_STEP.
        fields: the rest of a recipe, dotted.
        lacks: what puna has not; None: it can be predicted.
        mfu: share of the device's peak, by the full convention.
    """

    source: str
    device: str
    devices: int
    model: str
    length: int
    tokens_per_second: float | None
    recompute: str | None = None
    rows: int | None = None
    rows_a_step: int | None = None
    fields: tuple[tuple[str, Any], ...] = ()
    per_node: int = 8
    lacks: str | None = None
    mfu: float | None = None

    @property
    def published(self) -> float | None:
        """Tokens a second of a device; None: the source gives MFU, and the model's shape is not among `MODELS`."""
        if self.mfu is None or self.model not in MODELS:
            return self.tokens_per_second
        return self.mfu * PROFILES[self.device].peak_flops / flops_per_token(MODELS[self.model], self.length)


TITAN, KEMPNER, FOUNDRY, NANOTRON = "torchtitan", "KempnerForge", "llm-foundry", "nanotron"
COMPILED = (("compile", True),)
PURE = (("precision", "bf16-pure"),)

RUNS = [
    Run(KEMPNER, "h200", 1, "Llama-3-8B", 4096, 10_471, "block", fields=(*COMPILED, *PURE)),  # in 80.7 GB: no fp32
    Run(KEMPNER, "h200", 4, "Llama-3-8B", 4096, 9_746, "block", fields=COMPILED, per_node=4),
    Run(KEMPNER, "h200", 8, "14.8B", 4096, 4_426, per_node=4),
    Run(KEMPNER, "h200", 32, "Llama-3-70B", 4096, 552, fields=(("parallel.tp", 4),), per_node=4),
    Run(TITAN, "h100", 8, "Llama-3-8B", 8192, 5_762, "selective", 2, 2),
    Run(TITAN, "h100", 8, "Llama-3-8B", 8192, 6_667, "selective", 2, 2, COMPILED),
    Run(TITAN, "h100", 128, "Llama-3-8B", 8192, 5_605, "selective", 2, 2),
    Run(TITAN, "h100", 128, "Llama-3-8B", 8192, 6_514, "selective", 2, 2, COMPILED),
    Run(TITAN, "h100", 256, "Llama-3-70B", 8192, 597, "block", fields=(("parallel.tp", 8),)),
    Run("torchao", "h100", 8, "Llama-3-8B", 8192, 6_150, None, 1, 1, COMPILED),
    Run("NeMo-Automodel", "h100", 64, "Llama-3-70B", 8192, 867, fields=(("parallel.cp", 2),)),
    Run(FOUNDRY, "h100", 8, "MPT-7B", 2048, 10_643),
    Run(FOUNDRY, "h100", 8, "MPT-7B", 4096, 8_611, "block"),
    Run(FOUNDRY, "h100", 8, "MPT-7B", 32_768, 3_318, rows=1),
    Run(FOUNDRY, "h100", 8, "MPT-13B", 4096, 4_717),
    Run(FOUNDRY, "h100", 8, "MPT-13B", 16_384, 2_985),
    Run(FOUNDRY, "h100", 8, "MPT-30B", 4096, 1_802),
    Run(FOUNDRY, "h100", 8, "MPT-30B", 8192, 1_384),
    Run(FOUNDRY, "h100", 128, "MPT-30B", 2048, 2_199),
    Run(FOUNDRY, "a100-80", 8, "MPT-7B", 2048, 4_641, "none"),
    Run(FOUNDRY, "a100-80", 8, "MPT-13B", 2048, 2_262),
    Run(FOUNDRY, "a100-80", 8, "MPT-30B", 4096, 814),
    Run(FOUNDRY, "a100-80", 64, "MPT-70B", 2048, 410),
    Run("llmq", "h100", 1, "Qwen2.5-7B", 1024, 13_860, fields=PURE),
    Run(NANOTRON, "h100", 8, "Llama, 8.86B", 4096, None, None, 1, 32,
        (("parallel.pp", 4), ("parallel.dp_replicate", 2)), mfu=0.4522),  # ZeRO-1: weights of replicas, once a step
    Run(NANOTRON, "h100", 128, "Llama, 80B", 4096, None, None, 1, 2,
        (("parallel.pp", 32), ("parallel.tp", 4)), mfu=0.3429),
    Run("MindFormers, 16 cards", "ascend-910b", 16, "Code Llama 34B", 4096, 669, "none", 1, 8,
        (("parallel.pp", 2), ("parallel.tp", 8))),
    Run("MindFormers, 32 cards", "ascend-910b", 32, "Code Llama 34B", 4096, 747, "none", 1, 8,
        (("parallel.pp", 4), ("parallel.tp", 4))),
    Run(TITAN, "h100", 8, "Llama-3-8B", 8192, 8_532, lacks="fp8"),
    Run(TITAN, "h100", 128, "Llama-3-8B", 8192, 8_380, lacks="fp8"),
    Run(TITAN, "h100", 256, "Llama-3-70B", 8192, 829, lacks="fp8"),
    Run(TITAN, "h100", 256, "Llama-3-70B", 8192, 876, lacks="fp8, async tp"),
    Run(TITAN, "h100", 256, "Llama-3-70B", 8192, 652, lacks="async tp"),
    Run(TITAN, "h100", 512, "Llama-3-405B", 8192, 100, lacks="fp8"),
    Run(TITAN, "h100", 512, "Llama-3-405B", 8192, 128, lacks="fp8"),
    Run(TITAN, "h100", 8, "Llama-3-8B", 32_768, 3_890, lacks="fp8"),
    Run(TITAN, "h100", 8, "Llama-3-8B", 65_536, 2_540, lacks="fp8"),
    Run(TITAN, "h100", 8, "Llama-3-8B", 131_072, 1_071, lacks="fp8"),
    Run(TITAN, "h100", 8, "Llama-3-8B", 262_144, 548, lacks="fp8"),
    Run(TITAN, "h200", 32, "Llama-3-8B", 8192, 10_938, lacks="fp8"),
    Run(TITAN, "h200", 64, "Llama-3-8B", 8192, 10_753, lacks="fp8"),
    Run("torchao", "h100", 8, "Llama-3-8B", 8192, 7_690, lacks="fp8"),
    Run("torchao", "h100", 8, "Llama-3-8B", 8192, 6_768, lacks="fp8"),
    Run("NeMo-Automodel", "h100", 1, "Llama-3-8B", 4096, 12_473, lacks="LoRA"),
    Run("NeMo-Automodel", "h100", 8, "Qwen2.5-32B", 4096, 2_250, lacks="LoRA"),
    Run("NeMo", "h100", 8, "Llama-2-7B", 4096, 16_934, lacks="fp8"),
    Run("NeMo", "h100", 16, "Llama-2-13B", 4096, 8_715, lacks="fp8"),
    Run("NeMo", "h100", 64, "Llama-2-70B", 4096, 1_728, lacks="fp8"),
    Run("NeMo, fine-tuning", "h100", 8, "Llama-2-7B", 4096, 16_891, lacks="fp8"),
    Run("NeMo, fine-tuning", "h100", 8, "Llama-2-13B", 4096, 10_176, lacks="fp8"),
    Run("NeMo, fine-tuning", "h100", 16, "Llama-2-70B", 4096, 1_816, lacks="fp8"),
    Run("NeMo, LoRA", "h100", 8, "Llama-2-7B", 4096, 24_824, lacks="fp8, LoRA"),
    Run("NeMo, LoRA", "h100", 8, "Llama-2-13B", 4096, 14_629, lacks="fp8, LoRA"),
    Run("NeMo, LoRA", "h100", 8, "Llama-2-70B", 4096, 2_621, lacks="fp8, LoRA"),
    Run("Megatron-LM", "h100", 8, "Llama-3-8B", 8192, 13_812, lacks="fp8"),
    Run("Megatron-Bridge", "h100", 8, "Llama-3-8B", 8192, 14_451, lacks="fp8"),
    Run("Megatron-Bridge", "h100", 64, "Llama-3-70B", 8192, 1_664, lacks="fp8"),
    Run("Megatron-Bridge, fine-tuning", "h100", 32, "Llama-3-70B", 4096, 1_638, lacks="fp8"),
    Run("Megatron-Bridge, LoRA", "h100", 8, "Llama-3-70B", 4096, 2_643, lacks="fp8, LoRA"),
    Run("llmq", "h100", 1, "Qwen2.5-14B", 1024, 6_330, lacks="state in host memory"),
    Run("nanochat", "h100", 8, "d18", 2048, None, lacks="Muon, sliding windows", mfu=0.46),
    Run("Megatron-LM, strong scaling", "h100", 96, "GPT-3, 177B", 4096, None, lacks="async tp", mfu=0.47),
    Run("Megatron-LM, strong scaling", "h100", 4608, "GPT-3, 177B", 4096, None, lacks="async tp", mfu=0.42),
    Run("Megatron-LM, weak scaling", "h100", 6144, "GPT, 462B", 4096, None, lacks="async tp", mfu=0.47),
]  # fmt: skip


def main() -> None:
    """Predicts every run and records."""
    arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    rows = [_row(run) for run in RUNS]
    predicted = [row for row in rows if "error" in row]
    missed = [
        f"{row['source']} {row['model']}@{row['length']}, {row['device']}{', compiled' * row['is_compiled']}"
        for row in predicted
        if abs(row["error"]) > GOAL
    ]
    facts = {
        "goal": f"within {GOAL:.0%} of what was measured",
        "predicted": len(predicted),
        "missed": len(missed),
        "misses": missed,
        "not_predicted": len(rows) - len(predicted),
    }
    record("plan", rows, facts)


def _row(run: Run) -> dict[str, Any]:
    row = {
        "source": run.source, "device": f"{run.devices} x {run.device}", "model": run.model, "length": run.length,
        "published": run.published, "published_mfu": run.mfu,
    }  # fmt: skip
    if run.lacks is not None:
        return row | {"why_not": f"puna has no {run.lacks}"}
    judged, fits = _predict(run)
    tokens_per_second = judged.speed.tokens_per_second / run.devices
    return row | {
        "predicted": round(tokens_per_second),
        "error": tokens_per_second / run.published - 1,
        "layout": str(judged.layout),
        "rows_at_once": judged.recipe.micro_batch_rows,
        "recompute": judged.recipe.recompute,
        "is_compiled": judged.recipe.compile,
        "memory_gib": judged.memory.gib,
        "fits": fits,
    }


def _predict(run: Run) -> tuple[Judged, bool]:
    """The fastest of what the source leaves open that fits, or the smallest where nothing does."""
    profile = PROFILES[run.device]
    if run.device in HOPPER:
        profile = replace(profile, attention_share=FLASH_2)
    rows_a_step = run.rows_a_step or max(1, TOKENS_A_STEP // run.length)
    judged = []
    for recompute in RECOMPUTE if run.recompute is None else (run.recompute,):
        for rows in ROWS_AT_ONCE if run.rows is None else (run.rows,):
            try:
                recipe = _recipe(run, recompute, rows, rows_a_step)
                search = Search(recipe, MODELS[run.model], Cluster(profile, run.per_node), run.devices,
                                profile.memory_gib)  # fmt: skip
                judged.append(search.judge(recipe))
            except UsageError:
                continue  # these rows at once do not divide a step
    fitting = [each for each in judged if search.fits(each)]
    if fitting:
        return min(fitting, key=lambda each: each.speed.step_seconds), True
    return min(judged, key=lambda each: each.memory.total), False


def _recipe(run: Run, recompute: str, rows: int, rows_a_step: int) -> Recipe:
    content = {
        "model": "unused", "data": {"train": "unused"}, "run_dir": "unused", "steps": 1, "sequence_length": run.length,
        "precision": "bf16", "recompute": recompute, "micro_batch_rows": rows,
    }  # fmt: skip
    content["batch_tokens"] = run.length * rows_a_step * run.devices
    return load_recipe(content, dict(run.fields))


if __name__ == "__main__":
    main()
