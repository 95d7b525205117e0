"""AdamW on parameters by name, sharded or not, with its state in fp32, bf16, 8 or 4 bits.

The update walks over the rows of the weights in pieces that fit the cache, so the dozen element-wise operations of a
step read and write memory once. Where there is a kernel for all of them it serves: `puna.train.update_kernel` on CUDA,
torch's own for fp32 on a CPU. State is a few tensors a parameter under the parameter's own name, sharded as it is, so
checkpoints need no map. Where a number is rounded by chance (`puna.train.rounding`), a step gives the same bits on one
device and on many.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from puna.config import Optimizer
from puna.devices import has_triton, takes_cuda_kernels
from puna.errors import PunaError
from puna.model.optimizer_state import MOMENTS, block_of, is_blockwise, misfit, state_shapes
from puna.train.low_bit import Blocks, signed_levels, unsigned_levels
from puna.train.rounding import Chance, Place, round_stochastically, seeds_of

#: Elements updated at a time: on a CPU the pieces of weight, gradient and state stay in its cache.
PIECE = {"cpu": 1 << 16}
PIECE_ELSEWHERE = 1 << 24

#: Torch's fused update takes so many numbers at a time and rounds those left over another way, so rows must be a
#: multiple of it: a weight then has the same bits wherever it is cut.
LANES = 16

#: Gives random bits, (rows, columns) of int32 from 0 to 2^16 - 1.
Bits = Callable[[], Tensor]


class AdamW:
    """AdamW (arXiv:1711.05101) with the learning rate given at each step.

    Parameters in bf16 are rounded stochastically, and so is state in bf16: a small update then moves a weight with a
    probability instead of never.

    Args:
        parameters: (name, parameter) pairs; those of one dimension do not decay. Sharded ones are DTensors.
        settings: betas, eps, weight decay, bits of the state; with 32 bits the state has the parameter's dtype.
        seed: of the stochastic rounding.
        bias_correction: divides the running means by what they lack in early steps; False only to repeat systems
            that leave it out.

    Raises:
        PunaError: the columns of a weight are split where its blocks of 8 or 4 bits cannot be.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]], settings: Optimizer, *, seed: int, bias_correction: bool = True
    ) -> None:
        self.parameters = dict(parameters)
        self.settings = settings
        self.seed = seed
        self.bias_correction = bias_correction
        #: Kind -> parameter's name -> tensor: "exp_avg" and "exp_avg_sq", running mean of the gradient and of its
        #: square, as numbers or as codes; for codes "exp_avg_scales" and "exp_avg_sq_scales" too.
        self.state: dict[str, dict[str, Tensor]] = {}
        self._formats: dict[str, dict[str, _Format]] = {}
        self._codes: dict[tuple[str, int, torch.device], _Codes] = {}
        for name, parameter in self.parameters.items():
            if reason := misfit(tuple(parameter.shape), settings.state_bits, column_parts=_column_parts(parameter)):
                raise PunaError(f"{name} cannot have optimizer state of {settings.state_bits} bits: {reason}")
            for kind, tensor in _state_of(parameter, settings.state_bits).items():
                self.state.setdefault(kind, {})[name] = tensor
            self._formats[name] = self._formats_of(parameter)

    @torch.no_grad()
    def step(
        self,
        update: int,
        lr: float,
        *,
        grad_scale: float = 1.0,
        take: Callable[[str], Tensor | None] | None = None,
    ) -> None:
        """Moves the weights once; gradients are used up.

        Args:
            update: counted from 1; sets the bias correction and the random bits of the rounding.
            lr: learning rate of this update.
            grad_scale: multiplies every gradient first (clipping).
            take: gives a parameter's gradient by name, where it is not in `.grad`; parameters without one stay.
        """
        for name, parameter in self.parameters.items():
            grad = parameter.grad if take is None else take(name)
            if grad is not None:
                self.move(name, grad, update, lr, grad_scale=grad_scale)

    @torch.no_grad()
    def move(self, name: str, grad: Tensor, update: int, lr: float, *, grad_scale: float = 1.0) -> None:
        """Moves one weight; arguments as for `step`."""
        parameter = self.parameters[name]
        weight = local_part(parameter.detach())
        if not weight.numel():
            return
        state = {kind: local_part(tensors[name]) for kind, tensors in self.state.items() if name in tensors}
        tensors = {"weight": weight, "grad": local_part(placed_like(grad, parameter).detach()).contiguous(), **state}
        rows = {kind: tensor if tensor.dim() == 2 else tensor.view(len(tensor), -1) for kind, tensor in tensors.items()}
        if parameter.dim() == 2 and _is_for_torch(rows):
            self._update_by_torch(rows, update, lr, grad_scale)
            return
        place = Place.of(parameter)
        kinds = ("weight", *MOMENTS)
        seeds = {kind: seeds_of(f"{self.seed}:{update}:{name}:{kind}") for kind in kinds}
        factors = self._factors(update, lr, grad_scale, decays=parameter.dim() > 1)
        formats = self._formats[name]
        if takes_cuda_kernels(weight.device.type) and (update_kernel := _update_kernel()) is not None:
            if parameter.dim() == 1:
                rows = {kind: tensor.view(1, -1) for kind, tensor in rows.items()}
            blocks = {kind: codes.blocks for kind, codes in formats.items() if isinstance(codes, _Codes)}
            chances = {kind: Chance.of(seeds[kind], place) for kind in kinds}
            update_kernel(rows, blocks, factors, chances)
            return
        size = rows_at_once(rows["weight"])
        for start in range(0, len(rows["weight"]), size):
            piece = {kind: tensor[start : start + size] for kind, tensor in rows.items()}
            chances = {kind: Chance.of(seeds[kind], place.below(start)) for kind in kinds}
            _update_piece(piece, formats, factors, chances)

    def _update_by_torch(self, rows: dict[str, Tensor], update: int, lr: float, grad_scale: float) -> None:
        steps_before = torch.tensor(float(update - 1) if self.bias_correction else math.inf)
        beta1, beta2 = self.settings.betas
        weight, grad, mean, square = ([rows[kind]] for kind in ("weight", "grad", *MOMENTS))
        adamw(
            weight, grad, mean, square, [], [steps_before], fused=True, lr=lr,
            beta1=beta1, beta2=beta2, eps=self.settings.eps, weight_decay=self.settings.weight_decay,
            grad_scale=torch.tensor(1 / grad_scale), amsgrad=False, maximize=False,
        )  # fmt: skip

    def _factors(self, update: int, lr: float, grad_scale: float, *, decays: bool) -> "Factors":
        beta1, beta2 = self.settings.betas
        lacks1, lacks2 = (1 - beta1**update, 1 - beta2**update) if self.bias_correction else (1.0, 1.0)
        kept = 1 - lr * (self.settings.weight_decay if decays else 0.0)
        return Factors(beta1, beta2, self.settings.eps, grad_scale, kept, -lr / lacks1, lacks2)

    def _formats_of(self, parameter: Tensor) -> dict[str, "_Format"]:
        formats: dict[str, _Format] = dict.fromkeys(("weight", *MOMENTS), _Numbers())
        bits = self.settings.state_bits
        if is_blockwise(tuple(parameter.shape), bits):
            device, block = local_part(parameter).device, block_of(parameter.shape[1])
            for kind, levels in zip(MOMENTS, (signed_levels, unsigned_levels), strict=True):
                key = (kind, block, device)
                if key not in self._codes:  # their tables are larger than many a weight
                    by_chance = bits == 4 and kind == "exp_avg"
                    self._codes[key] = _Codes(Blocks(levels(bits), block, device, by_chance=by_chance))
                formats[kind] = self._codes[key]
        return formats


@dataclass(frozen=True)
class Factors:
    """What a step multiplies with.

    Attributes:
        beta1, beta2: decay of the running means of the gradient and of its square.
        eps: is added to the root of the mean square.
        grad_scale: of every gradient (clipping).
        weight_kept: 1 - learning rate * weight decay.
        minus_lr: -learning rate / bias correction of the mean gradient.
        square_lacks: bias correction of the mean square, which divides it.
    """

    beta1: float
    beta2: float
    eps: float
    grad_scale: float
    weight_kept: float
    minus_lr: float
    square_lacks: float


def _update_piece(
    piece: dict[str, Tensor], formats: dict[str, "_Format"], factors: Factors, chances: dict[str, Chance]
) -> None:
    """Moves some rows of a weight, in place: "weight", "grad" and the state's kinds, (rows, columns) each."""
    p, m, v = (formats[kind].read(piece, kind) for kind in ("weight", *MOMENTS))
    g = piece["grad"].float() * factors.grad_scale
    m.lerp_(g, 1 - factors.beta1)
    v.mul_(factors.beta2).addcmul_(g, g, value=1 - factors.beta2)
    root = (v / factors.square_lacks).sqrt_().add_(factors.eps)
    p.mul_(factors.weight_kept).addcdiv_(m, root, value=factors.minus_lr)
    for kind, exact in zip(("weight", *MOMENTS), (p, m, v), strict=True):
        formats[kind].write(exact, piece, kind, partial(chances[kind].bits, exact))


def _is_for_torch(rows: dict[str, Tensor]) -> bool:
    """Whether torch's fused update gives a number the same bits wherever its weight is cut, on a CPU."""
    weight = rows["weight"]
    is_fp32 = all(tensor.dtype == torch.float32 for tensor in rows.values())
    return weight.device.type == "cpu" and is_fp32 and weight.shape[1] % LANES == 0


@cache
def _update_kernel() -> Callable[..., None] | None:
    """The update in one kernel, where Triton is there."""
    if not has_triton():
        return None
    from puna.train import update_kernel

    return update_kernel.update


class _Format(Protocol):
    """How one of weight, exp_avg and exp_avg_sq lies in memory, in the tensors of a piece."""

    def read(self, piece: dict[str, Tensor], kind: str) -> Tensor:
        """The numbers in fp32; they may be changed in place."""

    def write(self, exact: Tensor, piece: dict[str, Tensor], kind: str, bits: Bits) -> None:
        """Keeps what `read` gave and the step has changed."""


class _Numbers:
    """fp32, changed in place, or bf16, rounded by chance."""

    def read(self, piece: dict[str, Tensor], kind: str) -> Tensor:
        return piece[kind].float() if piece[kind].dtype == torch.bfloat16 else piece[kind]

    def write(self, exact: Tensor, piece: dict[str, Tensor], kind: str, bits: Bits) -> None:
        if piece[kind].dtype == torch.bfloat16:
            piece[kind].copy_(round_stochastically(exact, bits()))


class _Codes:
    """8 or 4 bits a number, and scales."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def read(self, piece: dict[str, Tensor], kind: str) -> Tensor:
        return self.blocks.read(piece[kind], piece[f"{kind}_scales"])

    def write(self, exact: Tensor, piece: dict[str, Tensor], kind: str, bits: Bits) -> None:
        self.blocks.write(exact, piece[kind], piece[f"{kind}_scales"], bits)


def rows_at_once(x: Tensor) -> int:
    """Rows of a (rows, columns) tensor that are worked on together."""
    return max(1, PIECE.get(x.device.type, PIECE_ELSEWHERE) // x.shape[1])


def local_part(tensor: Tensor) -> Tensor:
    """What a rank holds of a tensor: of a DTensor its part, else all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(grad: Any, parameter: Tensor) -> Tensor:
    """A gradient with its parameter's placements; where it has others, e.g. a sum that is due, ranks communicate."""
    if isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        return grad.redistribute(parameter.device_mesh, parameter.placements)
    return grad


def sharded_like(part: Tensor, parameter: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A rank's part of a tensor that is sharded as a parameter is: as a DTensor where the parameter is one.

    Args:
        part: what the rank holds.
        parameter: whose mesh and placements it has.
        shape: of the whole; None: the parameter's.
    """
    if not isinstance(parameter, DTensor):
        return part
    shape = tuple(parameter.shape) if shape is None else shape
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False,
        shape=torch.Size(shape), stride=(*shape[1:], 1),
    )  # fmt: skip


def _column_parts(parameter: Tensor) -> int:
    """Ranks that the columns of a matrix are split over."""
    if not isinstance(parameter, DTensor):
        return 1
    splits = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in splits if getattr(placement, "dim", None) == 1)


def _state_of(parameter: Tensor, bits: int) -> dict[str, Tensor]:
    """Zeros for the state of a parameter, sharded as it is."""
    part = local_part(parameter.detach())
    shapes = partial(state_shapes, state_bits=bits, weight_dtype=str(part.dtype).removeprefix("torch."))
    whole = shapes(tuple(parameter.shape))
    return {
        kind: sharded_like(
            torch.zeros(shape, dtype=getattr(torch, dtype), device=part.device), parameter, whole[kind][0]
        )
        for kind, (shape, dtype) in shapes(tuple(part.shape)).items()
    }
