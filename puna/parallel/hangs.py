"""A collective that some rank never joins: when the others' time is up, they say what each rank did last.

torch's flight recorder notes every collective that a rank calls. A thread in each rank looks now and then whether one
of them has given up, and then posts its own last note, however stuck the rank itself is:

    rank 0: time is up ─▶ store: "hang" ─▶ every rank's thread: store "hang/r" = its last collective ─▶ rank 0's error

gloo, which every run uses for the numbers of its steps, gives up with an error, and that becomes the one here. NCCL's
watchdog ends the process instead; it prints each waiting rank's collective itself. A rank that ends is no hang: gloo
tells the others at once, and they leave with one line each, so that its own words are not lost among theirs. On other
machines the threads say these words.
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from puna.errors import PunaError
from puna.parallel.errors import RankLost, complain_of_cause

#: Seconds between two looks, and how long a rank that gives up waits for what the others say.
LOOK_SECONDS, ANSWER_SECONDS = 1.0, 5.0

KEY = "puna/hang"

#: Of torch's recorders, those that this build has: of gloo and of NCCL.
RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")


@contextlib.contextmanager
def explained_hangs() -> Iterator[None]:
    """While open, a collective that waits in vain ends in an error that says why, and what every rank did last.

    Raises:
        PunaError: in place of the error of torch.
    """
    shared: Any = dist.distributed_c10d._get_default_store()
    store = shared.clone()  # a connection of its own: the process may be waiting with the other one
    is_over, is_told = threading.Event(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(store, is_over, is_told), daemon=True)
    watcher.start()
    try:
        yield
    except RuntimeError as error:
        if re.search(r"(closed|reset) by peer", str(error), re.IGNORECASE):
            if not is_told.is_set():
                complain_of_cause(store)
            raise RankLost("another rank ended while this one waited for it; what it said says why") from error
        if not re.search(r"time[d]?[ -]?out", str(error), re.IGNORECASE):
            raise
        raise PunaError(_message(store)) from error
    finally:
        is_over.set()
        watcher.join()


def last_collective() -> str:
    """What this rank called last, e.g. "gloo:all_reduce, number 12 of the group mesh_tp, shape [1], 600 s ago"."""
    entries = []
    for name in RECORDERS:
        if (dump := getattr(c10d, name, None)) is not None:
            entries += json.loads(dump()).get("entries", [])
    if not entries:
        return "no collective yet"
    last = max(entries, key=lambda entry: entry["time_created_ns"])
    number = last["p2p_seq_id"] if last["is_p2p"] else last["collective_seq_id"]
    shape = ", ".join(map(str, last["input_sizes"][:1]))
    ago = time.time() - last["time_created_ns"] / 1e9
    group = last["process_group"][1]
    return f"{last['profiling_name']}, number {number} of the group {group}, shape {shape}, {ago:.0f} s ago"


def _watch(store: dist.Store, is_over: threading.Event, is_told: threading.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the store is gone with the rank that keeps it
        while not is_over.wait(LOOK_SECONDS):
            if not is_told.is_set() and complain_of_cause(store):
                is_told.set()
            if store.check([KEY]):
                store.set(f"{KEY}/{dist.get_rank()}", last_collective())
                return


def _message(store: dist.Store) -> str:
    """What all ranks did last, those together that did the same."""
    rank, size = dist.get_rank(), dist.get_world_size()
    said = {rank: last_collective()}
    with contextlib.suppress(RuntimeError):
        store.set(KEY, "")
        keys = {other: f"{KEY}/{other}" for other in range(size) if other != rank}
        deadline = time.monotonic() + ANSWER_SECONDS
        while keys and time.monotonic() < deadline:
            for other, key in list(keys.items()):
                if store.check([key]):
                    said[other] = store.get(key).decode()
                    del keys[other]
            time.sleep(0.1)
    by_note: dict[str, list[int]] = {}
    for other in range(size):
        by_note.setdefault(said.get(other, "no answer: stopped, or its machine is lost"), []).append(other)
    notes = "\n".join(f"  rank {', '.join(map(str, ranks))}: {note}" for note, ranks in by_note.items())
    return f"the other ranks were waited for in vain; the last collective of each:\n{notes}"
