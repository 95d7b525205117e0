"""Scores: what a model writes, judged.

`evaluate(benchmark, model)` is the twin of `puna evaluate BENCHMARK MODEL`. The benchmarks are the files of
`benchmarks/`; programs that a model wrote run in `sandbox.py` and nowhere else.
"""

import gc
import inspect
from pathlib import Path
from typing import Any

from puna.errors import PunaError, UsageError
from puna.evaluate import benchmarks
from puna.twins import make_callable

make_callable(__name__)

#: Files of a model that its answers depend on.
OF_A_MODEL = ("*.safetensors", "*.bin", "config.json", "tokenizer*")


def evaluate(
    benchmark: str,
    model: Any = None,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    device: Any = None,
    output: Path | str | None = None,
    nproc: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores a model, or samples that were made before, on a benchmark.

    Args:
        benchmark: a file of `puna/evaluate/benchmarks`, e.g. "humaneval" or "completion".
        model: a folder or hub id, or a model in memory (then with `tokenizer`); None where `samples` are given.
        tokenizer: the model's; that of its folder by default.
        dtype: of the weights of a model that is loaded; as stored by default.
        device: where a model that is loaded goes; an accelerator by default, if there is one.
        output: a folder for the result, and for the answers and verdicts where the benchmark has such; a run that was
            killed goes on with what is there.
        nproc: processes that load the model and answer, one a device, where programs are judged.
        options: the benchmark's own: `samples`, `data`, `protocol` … where programs are judged, `corpus`,
            `cases` … for completion; None leaves one at its default.

    Returns:
        The result, e.g. `{"benchmark": "humaneval", "pass@1": 0.335, "tasks": 164, …}`; JSON can spell it.

    Raises:
        PunaError: a file is missing or not what it should be, or the sandbox does not work here.
        UsageError: no such benchmark or option.
    """
    from puna.devices import pick_device
    from puna.evaluate.programs import Programs
    from puna.evaluate.spread import Replicas
    from puna.evaluate.stored import Stored, loaded
    from puna.files import check_writable, mark_of, write_json  # here, so that the sandbox needs no more than Python

    module = benchmarks.find(benchmark)
    options = {name: value for name, value in options.items() if value is not None}
    benchmarks.check_options(module, options)
    if output is not None and "output" in inspect.signature(module.evaluate).parameters:
        options["output"] = output
    name = str(model) if isinstance(model, str | Path) else None
    weights = None if name is None else mark_of(file for kind in OF_A_MODEL for file in Path(name).glob(kind))
    if output is not None:
        check_writable(output)
        _check_same(Path(output), {"benchmark": benchmark, "model": name, "weights": weights})
    if "cache_dtype" in options:
        from puna.generate.engine.storage import storage_dtype

        storage_dtype(options["cache_dtype"], pick_device(device))
    if nproc is not None:
        if name is None or not isinstance(getattr(module.evaluate, "__self__", None), Programs):
            raise UsageError(f"nproc={nproc} is for benchmarks of programs and a model named by its folder or hub id")
        model = Replicas(name, nproc, dtype=dtype, device=device)
    elif name is not None and "server" not in options:
        model = Stored(name, dtype, pick_device(device))
    elif model is not None and name is None:
        loaded(model, tokenizer)  # refuses one in memory that has no tokenizer
    if "name" in inspect.signature(module.evaluate).parameters:
        if name is not None:
            options |= {"name": name, "weights": weights, "dtype": dtype}
        elif model is not None and output is not None:
            from puna.model.mark import mark_in_memory

            options["weights"] = mark_in_memory(model)
    result: dict[str, Any] = module.evaluate(model=model, tokenizer=tokenizer, **options)
    gc.collect()  # a first import of torch's compiler leaves its callers' frames in a circle: the model, and its cache
    if name is not None:
        known = {"benchmark": result["benchmark"], "model": name, "weights": weights}
        if "answers" not in result:  # which say this already
            known |= {"dtype": dtype and str(dtype), "cache_dtype": options.get("cache_dtype")}
        result = {name: value for name, value in known.items() if value is not None} | result
    if output is not None:
        write_json(Path(output) / "result.json", result)
    return result


def _check_same(folder: Path, known: dict[str, Any]) -> None:
    """Refuses, before long work, a folder with a result of another benchmark or model, which would be lost.

    Raises:
        PunaError: it holds one.
    """
    from puna.files import read_json

    path = folder / "result.json"
    if not path.exists():
        return
    old = read_json(path)
    for name, value in known.items():
        if None not in (value, old.get(name)) and value != old[name]:
            raise PunaError(
                f"{folder} holds the result of another run: its {name} is {old[name]}, this one's {value}; "
                "choose another folder"
            )
