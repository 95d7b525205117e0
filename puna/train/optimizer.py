"""AdamW on parameters by name: fp32, or bf16 with stochastic rounding.

The update walks over the weights in pieces that fit the cache, so the dozen element-wise operations of a step read and
write memory once. State is two tensors a parameter under the parameter's own name, so checkpoints need no map.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from puna.config import Optimizer

#: Elements updated at a time: on a CPU the pieces of weight, gradient and state stay in its cache.
PIECE = {"cpu": 1 << 16}
PIECE_ELSEWHERE = 1 << 26


class AdamW:
    """AdamW (arXiv:1711.05101) with the learning rate given at each step.

    Parameters in bf16 have their state in bf16 too, and all three are rounded stochastically: a small update then
    moves a weight with a probability instead of never.

    Args:
        parameters: (name, parameter) pairs; those of one dimension do not decay.
        settings: betas, eps, weight decay.
        seed: of the stochastic rounding.
        bias_correction: divides the running means by what they lack in early steps; False only to repeat systems
            that leave it out.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]], settings: Optimizer, *, seed: int, bias_correction: bool = True
    ) -> None:
        self.parameters = dict(parameters)
        self.settings = settings
        self.seed = seed
        self.bias_correction = bias_correction
        #: "exp_avg" and "exp_avg_sq" -> parameter's name -> running mean of the gradient, and of its square.
        self.state: dict[str, dict[str, Tensor]] = {
            kind: {name: torch.zeros_like(p) for name, p in self.parameters.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }

    @torch.no_grad()
    def step(self, update: int, lr: float, *, grad_scale: float = 1.0) -> None:
        """Moves the weights once.

        Args:
            update: counted from 1; sets the bias correction and the random bits of the rounding.
            lr: learning rate of this update.
            grad_scale: multiplies every gradient first (clipping).
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            tensors = (parameter, parameter.grad, self.state["exp_avg"][name], self.state["exp_avg_sq"][name])
            size = PIECE.get(parameter.device.type, PIECE_ELSEWHERE)
            pieces = [tensor.detach().view(-1).split(size) for tensor in tensors]
            decay = self.settings.weight_decay if parameter.dim() > 1 else 0.0
            bits = self._random_bits(name, update, parameter) if parameter.dtype == torch.bfloat16 else None
            for p, g, m, v in zip(*pieces, strict=True):
                self._move(p, g, m, v, update, lr, decay, grad_scale, bits)

    def _move(
        self,
        p: Tensor,
        g: Tensor,
        m: Tensor,
        v: Tensor,
        update: int,
        lr: float,
        decay: float,
        grad_scale: float,
        bits: torch.Generator | None,
    ) -> None:
        beta1, beta2 = self.settings.betas
        g32 = g.float() * grad_scale
        if bits is None:
            p32, m32, v32 = p, m, v
        else:
            p32, m32, v32 = p.float(), m.float(), v.float()
        m32.lerp_(g32, 1 - beta1)
        v32.mul_(beta2).addcmul_(g32, g32, value=1 - beta2)
        lacks1, lacks2 = (1 - beta1**update, 1 - beta2**update) if self.bias_correction else (1.0, 1.0)
        root = (v32 / lacks2).sqrt_().add_(self.settings.eps)
        p32.mul_(1 - lr * decay).addcdiv_(m32, root, value=-lr / lacks1)
        if bits is not None:
            for kept, exact in ((p, p32), (m, m32), (v, v32)):
                kept.copy_(round_stochastically(exact, bits))

    def _random_bits(self, name: str, update: int, parameter: Tensor) -> torch.Generator:
        """Random bits that are a function of (seed, update, name): continuing a run repeats them."""
        digest = hashlib.sha256(f"{self.seed}:{update}:{name}".encode()).digest()
        return torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def round_stochastically(x: Tensor, bits: torch.Generator) -> Tensor:
    """Rounds fp32 to bf16, up or down with the probability that makes the mean right.

    bf16 is the upper half of fp32: adding 16 random bits and dropping the lower half does it. Values that are not
    finite stay what they are.
    """
    noise = torch.randint(0, 1 << 16, x.shape, generator=bits, device=x.device, dtype=torch.int32)
    rounded = ((x.contiguous().view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
