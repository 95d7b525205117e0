"""Calls of C functions: they get their arguments, threads share their work, and recorded ones are made again."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puna.model import calls
from puna.model.calls import NotRepeatable, Recording, library
from puna.native import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler")

SOURCE = """
void add(const long *x, long *out, long count, long a, long b, long c, long d, long e, long f, long g, long h, long i) {
#pragma omp for schedule(static)
    for (long at = 0; at < count; at++) out[at] += x[at] + a + b + c + d + e + f + g + h + 1000 * i;
}
void more(const long *x, long *out, long count) {
#pragma omp for schedule(static)
    for (long at = 0; at < count; at++) out[at] = x[at] + 1;
}
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> calls.Library:
    file = tmp_path_factory.mktemp("source") / "functions.c"
    file.write_text(SOURCE)
    found = library(file, ())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def add(functions: calls.Library) -> Callable[[Tensor], Tensor]:
    """Rows of int64 with 1000 * 9 + 36 more."""
    function = functions["add"]

    def add(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out.numpy()[:] = 0  # torch does not see it
        function(x.data_ptr(), out.data_ptr(), len(x), *range(1, 10))
        return out

    return add


def test_a_function_gets_all_its_arguments_and_does_its_work_once(add: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(1000)
    assert torch.equal(add(x), x + 9036)


def test_recorded_calls_are_made_with_what_tensors_hold_by_then(add: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(100)
    recording = Recording(lambda: add(add(x.view(10, 10)[2:].flatten())).view(8, 10))
    assert not recording.output.any(), "not yet"
    others = [torch.full((80,), 7) for _ in range(100)]  # where memory was given back
    recording.replay()
    assert torch.equal(recording.output, x[20:].view(8, 10) + 2 * 9036)
    x += 1
    recording.output.zero_()
    recording.replay()  # `add` adds to what stands there: of the inner call, what it left the first time
    assert torch.equal(recording.output, 2 * (x[20:].view(8, 10) + 9036) - 1 + 9036)
    assert all((other == 7).all() for other in others)


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_of_a_recording_lie_where_those_lay_that_are_gone(functions: calls.Library, inference: bool) -> None:
    x = torch.arange(100)

    def more(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        functions["more"](x.data_ptr(), out.data_ptr(), x.numel())
        return out

    def chain() -> Tensor:
        kept = more(x).view(10, 10)  # the view alone holds what it shows
        out = more(kept)
        for _ in range(20):
            out = more(out)
        return more(kept)

    with torch.inference_mode(inference):
        recording = Recording(chain)
    recording.replay()
    assert torch.equal(recording.output, x.view(10, 10) + 2)
    assert len(recording._rooms) == 3, "of what is kept, and two in turn"


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "work",
    [lambda x: x + 1, lambda x: x.mul_(2), lambda x: x.view(10, 10).t().contiguous(), lambda x: x[x[0]]],
    ids=["sum", "in place", "copy", "depends"],
)
def test_what_torch_computes_is_refused(
    add: Callable[[Tensor], Tensor], work: Callable[[Tensor], Tensor], inference: bool
) -> None:
    with torch.inference_mode(inference):
        x = torch.arange(100)
        with pytest.raises(NotRepeatable):
            Recording(lambda: work(add(x)))
        assert torch.equal(add(x), x + 9036), "calls go on without it"


def test_calls_of_another_thread_are_its_own(add: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(100)

    def work() -> Tensor:
        thread = threading.Thread(target=add, args=(x,))
        thread.start()
        thread.join()
        return add(x)

    assert len(Recording(work)._calls) == 1


@pytest.mark.parametrize("missing", ["add.c", "calls.c"])
def test_without_its_library_or_ours_there_is_none(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = calls.build
    monkeypatch.setattr(calls, "build", lambda source, flags: None if source.name == missing else build(source, flags))
    calls._runner.cache_clear()
    (tmp_path / "add.c").write_text(SOURCE)
    assert library(tmp_path / "add.c", ()) is None
    monkeypatch.undo()
    calls._runner.cache_clear()
    assert library(tmp_path / "add.c", ()) is not None
