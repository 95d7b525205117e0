"""Memory of the host that a rank takes beside its device's: gradients and activations that wait there, and copies.

Page-locked memory, which an accelerator reads by itself, torch gives out in powers of two; on a CPU nothing has to wait
elsewhere, and copies are as large as what they copy.
"""

from puna.devices import page_locked
from puna.plan.case import Case, Recompute

#: Kept from the first save on, if there is room for them; else training waits for each save.
COPIES = "copies for checkpoints"

#: Rows of the table, in its order, and what each of them is.
ROWS = {
    "gradients": "sums over micro-batches, with optimizer.in_backward",
    "activations": "inputs of layers, with recompute=offload",
    COPIES: "weights and optimizer state",
}


def host_memory(case: Case, recompute: Recompute) -> dict[str, float]:
    """Bytes that the rank which takes most has in host memory: row of ROWS -> bytes."""
    ranks = {0, case.layout.pp - 1}
    return max((_of_rank(case, recompute, rank) for rank in ranks), key=lambda rows: sum(rows.values()))


def _of_rank(case: Case, recompute: Recompute, rank: int) -> dict[str, float]:
    layout, stages = case.layout, case.stages_of(rank)
    is_first, is_last = rank == 0, rank == layout.pp - 1
    parts = case.weights.parts(layout.tp, layout.shard_size)
    kinds = {"layer": sum(stages), "embedding": is_first, "norm": is_last, "head": is_last}
    held = [(n, parts[kind]) for kind, n in kinds.items()]
    if case.is_cpu:
        copies = sum(n * (case.weights.weight_bytes * part.own + part.state) for n, part in held)
        return {"gradients": 0, "activations": 0, COPIES: copies}
    waits = case.layers_again(recompute, max(stages)) * case.in_flight(rank) if recompute.mode == "offload" else 0
    return {
        "gradients": sum(n * part.locked for n, part in held) if case.has_gradients_on_host else 0,
        "activations": waits * page_locked(case.stream_bytes),
        COPIES: sum(n * (part.locked + part.locked_state) for n, part in held),
    }
