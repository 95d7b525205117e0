"""Scores: what a model writes, judged.

`evaluate(benchmark, model)` is the twin of `puna evaluate BENCHMARK MODEL`. The benchmarks are the files of
`benchmarks/`; programs that a model wrote run in `sandbox.py` and nowhere else.
"""

import gc
import inspect
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from puna.errors import PunaError
from puna.evaluate import benchmarks
from puna.twins import make_callable

make_callable(__name__)

#: Parameters of a benchmark that change no score.
NO_QUESTIONS = ("model", "tokenizer", "output", "batch")

#: How long processes that share a model wait for the first one, which judges what they wrote.
PATIENCE = timedelta(days=7)


def evaluate(
    benchmark: str,
    model: Any = None,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    device: Any = None,
    output: Path | str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores a model, or samples that were made before, on a benchmark.

    Processes that torchrun started and `torch.distributed.init_process_group` joined all call this: they share the
    model, if they load it or hold it so already; the first writes and judges, and all have the result, or the error
    where it cannot begin. One that it meets later, a full disk say, it has alone: the others wait until it leaves.

    Args:
        benchmark: a file of `puna/evaluate/benchmarks`, e.g. "humaneval" or "completion".
        model: a folder or hub id, or a model in memory (then with `tokenizer`); None where `samples` are given.
        tokenizer: the model's; that of its folder by default.
        dtype: of the weights of a model that is loaded; as stored by default.
        device: where a model that is loaded goes; an accelerator by default, if there is one.
        output: a folder for the result, and for the answers and verdicts where the benchmark has such; a run that was
            killed goes on with what is there.
        options: the benchmark's own: `samples`, `data`, `protocol` … where programs are judged, `corpus`,
            `cases` … for completion; None leaves one at its default.

    Returns:
        The result, e.g. `{"benchmark": "humaneval", "pass@1": 0.335, "tasks": 164, …}`; JSON can spell it.

    Raises:
        PunaError: a file is missing or not what it should be, or the sandbox does not work here.
        UsageError: no such benchmark or option, or processes that were started together have not been joined.
    """
    from puna.evaluate.stored import Stored, is_helper, is_shared, loaded  # here: the sandbox needs no more than Python

    module = benchmarks.find(benchmark)
    options = {name: value for name, value in options.items() if value is not None}
    benchmarks.check_options(module, options)
    if "cache_dtype" in options:
        from puna.devices import pick_device
        from puna.generate.engine.storage import storage_dtype

        storage_dtype(options["cache_dtype"], pick_device(device))
    if isinstance(model, str | Path) and "server" not in options:
        from puna.devices import pick_device
        from puna.parallel.mesh import rank_device

        model = Stored(str(model), dtype, rank_device(pick_device(device)))
    elif model is not None and "server" not in options:
        loaded(model, tokenizer)  # refuses one in memory that has no tokenizer
    if not is_shared(model):
        return _result(benchmark, model, tokenizer, output, options)
    import torch.distributed as dist

    from puna.parallel.collectives import of_first_rank

    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    result = _result(benchmark, model, tokenizer, None if is_helper(model) else output, options)
    return of_first_rank(result, patient)


def check(benchmark: str, model: str, *, dtype: Any = None, output: Path | str | None = None, **options: Any) -> None:
    """Says what `evaluate` would say of a model's files, and of its folder, when those before it are scored.

    Raises:
        PunaError: a file is missing or damaged, or the folder is another result's.
        UsageError: no such benchmark or option.
    """
    from puna.evaluate.stored import Stored

    module = benchmarks.find(benchmark)
    options = {name: value for name, value in options.items() if value is not None}
    benchmarks.check_options(module, options)
    if "server" in options:
        return
    stored = Stored(model, dtype)
    stored.check()
    if output is not None:
        _check_same(Path(output), _known(benchmark, stored, options))


def _result(
    benchmark: str, model: Any, tokenizer: Any, output: Path | str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """What a benchmark says, and of which model; written into a folder if there is one."""
    from puna.evaluate.stored import agreed
    from puna.files import check_writable, write_json

    module, known = benchmarks.find(benchmark), _known(benchmark, model, options)
    with agreed(model):
        if output is not None:
            check_writable(output)
            _check_same(Path(output), known)
    if output is not None and "output" in inspect.signature(module.evaluate).parameters:
        options = options | {"output": output}
    result: dict[str, Any] = module.evaluate(model=model, tokenizer=tokenizer, **options)
    gc.collect()  # a first import of torch's compiler leaves its callers' frames in a circle: the model, and its cache
    if "answers" in result:  # which say how they were asked for
        del known["options"]
    result = known | result
    if output is not None:
        write_json(Path(output) / "result.json", result)
    return result


def _known(benchmark: str, model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Of a result, what is known before: what is scored, and all that it is asked, by default too."""
    from puna.evaluate.stored import Stored

    known: dict[str, Any] = {"benchmark": benchmark}
    if isinstance(model, Stored):
        known |= model.named
    dtype = model.dtype if isinstance(model, Stored) else None
    return known | {"options": _asked(benchmarks.find(benchmark), options | {"dtype": dtype})}


def _asked(module: ModuleType, options: dict[str, Any]) -> dict[str, Any]:
    defaults = {name: option.default for name, option in inspect.signature(module.evaluate).parameters.items()}
    return {
        name: value if isinstance(value, int | float | None) else str(value)
        for name, value in (defaults | options).items()
        if name not in NO_QUESTIONS
    }


def _check_same(folder: Path, known: dict[str, Any]) -> None:
    """Refuses, before long work, a folder with a result of another benchmark, model or question, which would be lost.

    Raises:
        PunaError: it holds one.
    """
    from puna.files import differing, read_json

    path = folder / "result.json"
    if not path.exists():
        return
    old = read_json(path)
    before = {**known, **old, "options": {**known["options"], **old.get("options", {})}}  # earlier ones say less
    if changed := differing(known, {name: before[name] for name in known}):
        name, (new, was) = next(iter(changed.items()))
        raise PunaError(
            f"{folder} holds the result of another run: its {name} is {was}, this one's {new}; choose another folder"
        )
