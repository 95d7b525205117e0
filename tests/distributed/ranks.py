"""Functions called in several processes at once, as the ranks of one group."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist


def calls_in_ranks() -> Callable[..., list[Any]]:
    """Calls a function in so many processes joined by gloo; gives what each returned, None of one that died."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "puna.checkpoint"]
    )

    def call(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        with tempfile.TemporaryDirectory() as place:
            ends = []
            for rank in range(size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=as_rank, args=(rank, size, place, sender, function, arguments))
                process.start()
                sender.close()
                ends.append((process, receiver))
            results = [received(process, receiver) for process, receiver in ends]
        assert not [trace for kind, trace in results if kind == "failed"], "\n".join(str(r) for _, r in results)
        return [result for _, result in results]

    return call


def received(process: Any, receiver: Connection) -> tuple[str, Any]:
    """What a process sent, or that it died."""
    try:
        result = receiver.recv() if receiver.poll(90) else ("failed", "still at work after 90 seconds")
    except EOFError:
        result = ("died", None)
    process.join(10)
    if process.is_alive():
        process.kill()
        return "failed", f"does not end; {result}"
    return result


def as_rank(rank: int, size: int, place: str, sender: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    """Runs in each process."""
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=size)
    try:
        sender.send(("returned", function(*arguments)))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
    dist.destroy_process_group()
