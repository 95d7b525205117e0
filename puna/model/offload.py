"""Tensors that autograd keeps for the backward pass, in host memory meanwhile.

They leave on a stream of their own while the next layer is computed, and come back when the backward pass asks for
them. The bus carries them in a small part of the time that a layer takes: 34B's hidden states of 4,096 tokens are 64
MiB a layer. On a CPU they are copied within its memory, which is of no use but walks the same path.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from puna.devices import page_locked_like

#: Tensors that may be on their way to the host: the forward pass waits beyond that, or they would fill the device.
IN_FLIGHT = 2


@dataclass(frozen=True)
class _OnHost:
    copy: Tensor
    device: torch.device
    leaves: torch.Event | None


class Offload:
    """Keeps floating-point tensors on the host; one object serves all layers of a model, whose order it keeps."""

    def __init__(self) -> None:
        self._stream: torch.Stream | None = None
        self._in_flight: deque[tuple[torch.Event, Tensor]] = deque()

    def keeping(self) -> saved_tensors_hooks:
        """While open, what autograd saves goes to the host; integers, which are small, and what is empty, stay."""
        return saved_tensors_hooks(self._to_host, self._to_device)

    def _to_host(self, x: Tensor) -> Tensor | _OnHost:
        if not x.is_floating_point() or not x.numel():  # recomputation of torch 2.11 saves an empty tensor too
            return x
        if x.device.type == "cpu":
            return _OnHost(x.clone(), x.device, None)
        stream = self._stream = self._stream or torch.Stream(x.device)
        stream.wait_stream(torch.accelerator.current_stream(x.device))
        with stream:
            copy = page_locked_like(x).copy_(x, non_blocking=True)
            leaves = stream.record_event()
        self._in_flight.append((leaves, x.detach()))  # its memory is not given to others before it has left
        while len(self._in_flight) > IN_FLIGHT:
            self._in_flight.popleft()[0].synchronize()
        return _OnHost(copy, x.device, leaves)

    @staticmethod
    def _to_device(kept: Tensor | _OnHost) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.leaves is not None:
            torch.accelerator.current_stream(kept.device).wait_event(kept.leaves)
        return kept.copy.to(kept.device, non_blocking=True)
