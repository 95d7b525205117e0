"""What the optimizer keeps of a weight, how long an update takes, and how many bytes of gradients are in `.grad`.

    python benchmarks/optimizer_memory.py [--rows 2048] [--columns 2048] [--rounds 7]

Updates: one weight (rows, columns), every precision and number of bits in turn, round by round, so that what slows the
machine down slows all; torch's fused AdamW in fp32 is measured beside them. Gradients: one backward pass of a model of
8 layers for each place where gradients can be; the most bytes that all `.grad` together held when one had been formed.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from record import arguments, record
from turns import in_turn

from puna import devices
from puna.config import Optimizer
from puna.model.config import preset
from puna.model.llama import Llama, init_weights
from puna.train.gradients import Gradients, HostGradients, UpdatesInBackward
from puna.train.optimizer import AdamW

LR = 1e-4


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    args = arguments(parser)
    device = devices.pick_device()
    rows = updates((args.rows, args.columns), args.rounds, device)
    rows += [gradients(kind, device) for kind in (Gradients, HostGradients, UpdatesInBackward)]
    record("optimizer_memory", rows, {"weight": f"{args.rows} x {args.columns}", "device": str(device)})


def updates(shape: tuple[int, int], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Bytes of state and nanoseconds of an update, a weight's element."""
    n = shape[0] * shape[1]
    steps: dict[str, Callable[[int], None]] = {}
    state_bytes: dict[str, int] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for bits in (32, 8, 4):
            name = f"puna, {str(dtype).removeprefix('torch.')} weights, state_bits {bits}"
            adamw = AdamW([("w", _weight(shape, dtype, device))], Optimizer(state_bits=bits), seed=0)
            steps[name] = lambda update, adamw=adamw: adamw.step(update, LR)
            state_bytes[name] = sum(kind["w"].nbytes for kind in adamw.state.values())
    weight = _weight(shape, torch.float32, device)
    theirs = torch.optim.AdamW([weight], lr=LR, fused=True)
    steps["torch, fused, float32"] = lambda _: theirs.step()
    state_bytes["torch, fused, float32"] = 8 * n
    return [
        {
            "contender": name,
            "state_bytes_per_weight": state_bytes[name] / n,
            "ns_per_weight": taken.median / n * 1e9,
            "ns_per_weight_best": min(taken.seconds) / n * 1e9,
        }
        for name, taken in in_turn(steps, rounds, device=device).items()
    ]


def gradients(kind: type[Gradients], device: torch.device) -> dict[str, Any]:
    """The largest share of all gradients that was in `.grad` at once."""
    model = Llama(preset("tiny-512")).to(device)
    init_weights(model, seed=0)
    parameters = list(model.parameters())
    held = []
    for parameter in parameters:  # before the hooks that take gradients away
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
        )
    kind(AdamW(model.named_parameters(), Optimizer(), seed=0)).begin(1, LR)
    model(torch.arange(3, 35, device=device)[None]).sum().backward()
    total = sum(p.nbytes for p in parameters)
    return {"contender": kind.__name__, "grad_bytes": max(held), "share_of_all_gradients": max(held) / total}


def _weight(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.randn(shape, device=device).to(dtype))
    weight.grad = (torch.randn(shape, device=device) * 1e-3).to(dtype)
    return weight


if __name__ == "__main__":
    main()
