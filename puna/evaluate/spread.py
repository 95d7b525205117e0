"""One model on many devices: a process for each, which answer the asks of a batch between them.

    batch of nproc x 8 asks ──every nproc-th──▶ process 0 on cuda:0, process 1 on cuda:1, … ──▶ answers in their order

Each answer has a seed of its own, so the answers are those of one process.
"""

import contextlib
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

from puna.errors import PunaError, UsageError
from puna.evaluate.completing import Ask, OnAnswer


@dataclass(frozen=True)
class Replicas:
    """A model to be loaded by `count` processes: its folder or hub id, its dtype, and the kind of device."""

    model: str
    count: int
    dtype: Any = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"--nproc {self.count} must be 1 or more")


class Spread:
    """Answers by many processes; a context manager, which ends them.

    Args:
        replicas: what they load.
        options: of each one's `Completer`.

    Raises:
        PunaError: a process cannot load the model.
    """

    def __init__(self, replicas: Replicas, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use accelerators
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(replicas.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, replicas, rank, options), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.cut_prompts = 0

    def __call__(self, asks: Sequence[Ask], seeds: Sequence[int], on_answer: OnAnswer | None = None) -> list[str]:
        """The answers, in the order of the asks; each is given to `on_answer` once all of its process are there."""
        count = len(self._pipes)
        for rank, pipe in enumerate(self._pipes):
            with contextlib.suppress(OSError):  # it has ended; what it said before is read below
                pipe.send((list(asks[rank::count]), list(seeds[rank::count])))
        answers = [""] * len(asks)
        self.cut_prompts = 0
        for rank in range(count):
            texts, cut = self._received(rank)
            answers[rank::count] = texts
            self.cut_prompts += cut
            for number, text in enumerate(texts):
                if on_answer is not None:
                    on_answer(rank + number * count, text)
        return answers

    def _received(self, rank: int) -> tuple[list[str], int]:
        try:
            found = self._pipes[rank].recv()
        except (EOFError, ConnectionError):
            raise PunaError(f"process {rank} of {len(self._pipes)} ended while it was to answer") from None
        if isinstance(found, str):
            raise PunaError(f"process {rank} of {len(self._pipes)}: {found}")
        texts, cut = found
        return texts, cut

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()


def _serve(pipe: Connection, replicas: Replicas, rank: int, options: dict[str, Any]) -> None:
    try:
        complete = _completer(replicas, rank, options)
        while True:
            try:
                asks, seeds = pipe.recv()
            except EOFError:
                return
            pipe.send((complete(asks, seeds) if asks else [], complete.cut_prompts))
    except (PunaError, RuntimeError, OSError) as error:  # the others say what befell them, one line each
        pipe.send(f"{type(error).__name__}: {error}" if not isinstance(error, PunaError) else str(error))


def _completer(replicas: Replicas, rank: int, options: dict[str, Any]) -> Any:
    import torch

    from puna.devices import cpu_cores, device_names, pick_device
    from puna.evaluate.completing import Completer
    from puna.evaluate.stored import Stored, loaded

    kind = pick_device(replicas.device).type
    accelerators = [name for name in device_names() if name.partition(":")[0] == kind and name != "cpu"]
    if not accelerators:
        torch.set_num_threads(max(1, cpu_cores() // replicas.count))
    device = accelerators[rank % len(accelerators)] if accelerators else "cpu"
    return Completer(*loaded(Stored(replicas.model, replicas.dtype, pick_device(device)), None), **options)
