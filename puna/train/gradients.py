"""Where gradients are between the backward pass that forms them and the update that uses them.

    gradients.begin(update, lr)
    loss.backward()                        once for every micro-batch
    squares = gradients.squared_norm()     this rank's share: the shares of all ranks add up
    optimizer.step(update, lr, grad_scale=…, take=gradients.pop)
    gradients.clear()

Four places, one interface: `Gradients` stay on the device, as torch leaves them; `WideGradients` are summed there in
fp32 where torch would sum in bf16; `HostGradients` leave it as they are formed, and come back one by one for the
update; `UpdatesInBackward` are used as they are formed, and kept nowhere. FSDP calls the hooks of its sharded
parameters itself, once a gradient is reduced (`foreach_reduce` in torch's `_fsdp_collectives.py`, since
pytorch#129450), so all four are the same there.
"""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from puna.devices import page_locked_like
from puna.errors import PunaError
from puna.train.optimizer import AdamW, local_part, placed_like, rows_at_once, sharded_like
from puna.train.rounding import Chance, Place, round_stochastically, seeds_of

#: Bytes of gradients that may wait on the device for their way to host memory; the backward pass waits beyond that.
IN_FLIGHT_BYTES = 1 << 30

#: Numbers whose squares a CPU sums in one fp32 number, and how many such sums it forms at a time; see `square_of`.
SUMMED, ROWS = 1 << 14, 64

#: Makes a sum of the one before (None: there is none) and a gradient, both on the device.
Former = Callable[[Tensor | None, Tensor], Tensor]


def gradients_of(optimizer: AdamW, *, in_backward: bool, is_clipped: bool, micro_batches: int) -> "Gradients":
    """The place of the gradients that a run needs; made once, when parameters are sharded and have their device.

    Args:
        optimizer: whose parameters' gradients they are.
        in_backward: whether gradients may not stay on the device.
        is_clipped: whether the norm of all must be known before the first is used.
        micro_batches: backward passes of one update.
    """
    if not in_backward:
        is_bf16 = any(p.dtype == torch.bfloat16 for p in optimizer.parameters.values())
        return WideGradients(optimizer) if is_bf16 and micro_batches > 1 else Gradients(optimizer)
    return HostGradients(optimizer) if is_clipped or micro_batches > 1 else UpdatesInBackward(optimizer)


class Gradients:
    """Gradients on the device, in `.grad`: as many bytes as the weights have.

    Attributes:
        if_not_finite: what becomes of the weights in a step whose gradient is not finite, in words.
    """

    if_not_finite = "the weights were left alone"

    def __init__(self, optimizer: AdamW) -> None:
        self.optimizer = optimizer
        self.parameters: dict[str, Any] = optimizer.parameters
        self.update, self.lr = 0, 0.0

    def begin(self, update: int, lr: float) -> None:
        """Before the first backward pass of an update."""
        self.update, self.lr = update, lr

    @torch.no_grad()
    def squared_norm(self) -> float:
        """One rank's share of the squared 2-norm of the whole gradient: the shares of all ranks add up to it."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad = placed_like(parameter.grad, parameter)
        with_grad = {name: p for name, p in self.parameters.items() if p.grad is not None}
        return self._sum_of({name: share_of_square(p.grad, p) for name, p in with_grad.items()})

    def pop(self, name: str) -> Tensor | None:
        """A parameter's gradient, which is then no longer held here; None: there is none."""
        parameter = self.parameters[name]
        grad, parameter.grad = parameter.grad, None
        return grad

    def clear(self) -> None:
        """Drops what was not taken, e.g. because the norm is not finite."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def _sum_of(self, squares: dict[str, Tensor]) -> float:
        """Sum over parameters, always in their order, so that it is the same to the last bit."""
        found = [squares[name] for name in self.parameters if name in squares]
        return torch.stack(found).sum().item() if found else 0.0


class _Leaving(Gradients):
    """Gradients that a hook takes out of `.grad` as soon as they are there."""

    def __init__(self, optimizer: AdamW) -> None:
        super().__init__(optimizer)
        #: Name -> this rank's share of the squared norm, of each gradient or sum that there is.
        self._squares: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def squared_norm(self) -> float:
        """As for `Gradients`; each parameter's share was taken when its gradient was formed."""
        return self._sum_of(self._squares)

    def clear(self) -> None:
        super().clear()
        self._squares.clear()

    @torch.no_grad()
    def _take(self, name: str, parameter: Any) -> None:
        grad, parameter.grad = placed_like(parameter.grad, parameter), None
        self._use(name, grad)

    def _use(self, name: str, grad: Tensor) -> None:
        raise NotImplementedError


class _Sums(_Leaving):
    """Sums of the gradients of an update's micro-batches, by name.

    FSDP must reduce gradients in every micro-batch (`set_requires_gradient_sync` and `set_requires_all_reduce` left at
    True), or those that wait for it stay in `.grad`.

    Args:
        optimizer: whose parameters' gradients they are.
        kept: where.
    """

    def __init__(self, optimizer: AdamW, kept: "_Kept | _PageLocked") -> None:
        super().__init__(optimizer)
        self._sums = kept
        self._counts: dict[str, int] = {}

    def squared_norm(self) -> float:
        """As for `Gradients`, once all sums are formed."""
        self._sums.wait()
        return super().squared_norm()

    def pop(self, name: str) -> Tensor | None:
        """A parameter's sum, on the device."""
        if name not in self._squares:
            return None
        del self._squares[name], self._counts[name]
        return sharded_like(self._sums.pop(name), self.parameters[name])

    def clear(self) -> None:
        super().clear()
        self._counts.clear()
        self._sums.clear()

    def _use(self, name: str, grad: Tensor) -> None:
        count = self._counts[name] = self._counts.get(name, 0) + 1

        def form(before: Tensor | None, grad: Tensor) -> Tensor:
            total = self._first(grad) if before is None else self._added(name, count, before, grad)
            self._squares[name] = share_of_square(total, self.parameters[name])
            return total

        self._sums.form(name, local_part(grad), form)

    def _first(self, grad: Tensor) -> Tensor:
        """The sum of one."""
        return grad

    def _added(self, name: str, count: int, before: Tensor, grad: Tensor) -> Tensor:
        """The sum of so many."""
        raise NotImplementedError


class WideGradients(_Sums):
    """Sums in fp32 of gradients in bf16, on the device: 4 bytes a weight instead of 2.

    A sum in bf16 would lose what is less than a 512th of it: of hundreds of micro-batches, the most.
    """

    def __init__(self, optimizer: AdamW) -> None:
        super().__init__(optimizer, _Kept())

    def _first(self, grad: Tensor) -> Tensor:
        return grad.float()

    def _added(self, name: str, count: int, before: Tensor, grad: Tensor) -> Tensor:
        return before.add_(grad)


class HostGradients(_Sums):
    """Sums of gradients in host memory.

    A hook takes each gradient as it is formed, adds it to the sum of the micro-batches before, and clears it. Sums are
    added on the device, on a stream of their own: the sum before comes, the new one goes. What the device holds is what
    is on its way, `IN_FLIGHT_BYTES` and one weight at most, besides what the backward pass itself (or FSDP: one unit's
    gradients) has in hand.

    The host holds the size of a rank's gradients: 4 bytes a weight, 2 under bf16-pure, page-locked and taken when this
    is made. Over the bus go, for k micro-batches, 2k times as many bytes: k down, k - 1 up for the sums, and one up for
    the update. Under bf16-pure a sum is formed in fp32 and rounded stochastically to bf16: right on average, where
    torch's own sums in bf16 lose what is small; with one micro-batch it is the gradient. In fp32 the sums are torch's,
    bit for bit. On a CPU the sums stay where the gradients are; only the interface is the same.
    """

    def __init__(self, optimizer: AdamW) -> None:
        device = next((local_part(p).device for p in optimizer.parameters.values()), torch.device("cpu"))
        super().__init__(optimizer, _Kept() if device.type == "cpu" else _PageLocked(optimizer.parameters, device))

    def _added(self, name: str, count: int, before: Tensor, grad: Tensor) -> Tensor:
        if grad.dtype != torch.bfloat16 or not grad.numel():
            return before.add_(grad)
        seeds = seeds_of(f"{self.optimizer.seed}:{self.update}:{name}:sum of {count}")
        place = Place.of(self.parameters[name])
        rows, more = (x.contiguous().view(len(x), -1) for x in (before, grad))
        size = rows_at_once(rows)
        for start in range(0, len(rows), size):
            piece = rows[start : start + size]
            total = piece.float().add_(more[start : start + size])
            piece.copy_(round_stochastically(total, Chance.of(seeds, place.below(start)).bits(total)))
        return rows.view(before.shape)


class UpdatesInBackward(_Leaving):
    """Gradients used as they are formed: the update happens inside the backward pass, and nothing is kept.

    This needs one micro-batch and no clipping, since no norm is known before the last gradient. A gradient that is not
    finite leaves its own weight alone, on all ranks; others, which were finite, have moved theirs by then. The norm
    tells: it is not finite. Asking costs a wait for the device at every parameter.
    """

    if_not_finite = "weights whose own gradient was finite have moved, the others were left alone"

    def pop(self, name: str) -> Tensor | None:
        """None: whatever there was has been used."""
        return None

    def _use(self, name: str, grad: Tensor) -> None:
        if name in self._squares:
            raise PunaError(
                f"{name} got a second gradient in update {self.update}, but its first has been used; set "
                f"optimizer.max_grad_norm, so that gradients are summed before they are used"
            )
        self._squares[name] = share_of_square(grad, self.parameters[name])
        if is_finite_everywhere(self._squares[name], self.parameters[name]):
            self.optimizer.move(name, grad, self.update, self.lr)


def share_of_square(grad: Tensor, parameter: Any) -> Tensor:
    """A rank's share of a gradient's squared 2-norm, in fp32 on its device; ranks with the same part share it."""
    replicas = 1
    if isinstance(parameter, DTensor):
        axes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
        replicas = math.prod(size for size, placement in axes if placement.is_replicate())
    return square_of(local_part(grad)) / replicas


def square_of(x: Tensor) -> Tensor:
    """The squared 2-norm of a tensor, in fp32.

    On a CPU torch adds all squares to one number, which loses the last of them: a hundredth of a large matrix's norm.
    """
    if x.device.type != "cpu":
        return x.norm(dtype=torch.float32).square()
    flat = x.reshape(-1)
    end = len(flat) - len(flat) % SUMMED
    pieces = [*flat[:end].view(-1, SUMMED).split(ROWS), flat[None, end:]]
    return torch.stack([piece.float().norm(dim=-1).square().sum() for piece in pieces]).sum()


def is_finite_everywhere(square: Tensor, parameter: Any) -> bool:
    """Whether the shares of all ranks that hold a part of a parameter are finite; they all ask."""
    if isinstance(parameter, DTensor):
        total = square.clone()
        for axis, placement in enumerate(parameter.placements):
            if not placement.is_replicate():
                dist.all_reduce(total, group=parameter.device_mesh.get_group(axis))
        square = total
    return math.isfinite(square.item())


class _Kept:
    """Sums where they are formed."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def form(self, name: str, grad: Tensor, form: Former) -> None:
        self._sums[name] = form(self._sums.get(name), grad)

    def pop(self, name: str) -> Tensor:
        return self._sums.pop(name)

    def wait(self) -> None:
        pass

    def clear(self) -> None:
        self._sums.clear()


class _PageLocked:
    """Sums of an accelerator's gradients in page-locked host memory, formed on a stream of their own.

    The stream orders everything that touches a sum; `_in_flight` keeps what it works on alive until it has done so, and
    makes the host wait where that becomes too much.
    """

    def __init__(self, parameters: dict[str, Any], device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)
        self._sums = {name: page_locked_like(local_part(p)) for name, p in parameters.items()}
        self._is_formed: set[str] = set()
        self._in_flight: deque[tuple[torch.Event, Tensor, Tensor]] = deque()
        self._in_flight_bytes = 0

    def form(self, name: str, grad: Tensor, form: Former) -> None:
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            before = self._sums[name].to(self._device, non_blocking=True) if name in self._is_formed else None
            total = form(before, grad)
            self._sums[name].copy_(total, non_blocking=True)
            event = self._stream.record_event()
        self._is_formed.add(name)
        self._in_flight.append((event, grad, total))
        self._in_flight_bytes += grad.nbytes + (0 if total is grad else total.nbytes)
        while self._in_flight_bytes > IN_FLIGHT_BYTES:
            self._wait_for_oldest()

    def pop(self, name: str) -> Tensor:
        self._is_formed.remove(name)
        torch.accelerator.current_stream(self._device).wait_stream(self._stream)
        return self._sums[name].to(self._device, non_blocking=True)

    def wait(self) -> None:
        while self._in_flight:
            self._wait_for_oldest()
        self._stream.synchronize()

    def clear(self) -> None:
        self.wait()
        self._is_formed.clear()

    def _wait_for_oldest(self) -> None:
        event, grad, total = self._in_flight.popleft()
        event.synchronize()
        self._in_flight_bytes -= grad.nbytes + (0 if total is grad else total.nbytes)
