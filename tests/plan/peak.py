"""What a plan's memory is held against: the most bytes of tensors that live at a time while something runs on a CPU.

torch's profiler notes every allocation, and their running sum is the answer, to the byte and without the interpreter,
libraries and freed pages that a process's size has in it. It sees the calling thread alone: what gloo's threads hold
last would never be seen freed, so ranks are measured in a fake group.
"""

import gc
from collections.abc import Callable

from torch.autograd.profiler import profile


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes allocated at a time during `work`, beyond what is allocated before.

    Args:
        work: called once; all that it takes beyond the call should be allocated before.
    """
    gc.collect()  # what is garbage already would be freed while it runs
    with profile(profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
