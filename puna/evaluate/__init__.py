"""Scores: what a model writes, judged.

`evaluate(benchmark, model)` is the twin of `puna evaluate BENCHMARK MODEL`. The benchmarks are the files of
`benchmarks/`; programs that a model wrote run in `sandbox.py` and nowhere else.
"""

from pathlib import Path
from typing import Any

from puna.errors import UsageError
from puna.evaluate import benchmarks


def evaluate(
    benchmark: str, model: Any = None, *, tokenizer: Any = None, device: Any = None, **options: Any
) -> dict[str, Any]:
    """Scores a model, or samples that were made before, on a benchmark.

    Args:
        benchmark: a file of `puna/evaluate/benchmarks`, e.g. "humaneval" or "completion".
        model: a folder or hub id, or a model in memory (then `tokenizer` as well); None where `samples` are given.
        tokenizer: the model's; a folder's own by default.
        device: where to put a model that is loaded; the best there is by default.
        options: the benchmark's own: `samples`, `data`, `output`, `details` … for humaneval, `corpus`, `cases` … for
            completion; None leaves one at its default.

    Returns:
        The result, e.g. `{"benchmark": "humaneval", "pass@1": 0.335, "tasks": 164, …}`.

    Raises:
        PunaError: a file is missing or not what it should be, or the sandbox does not work here.
        UsageError: no such benchmark or option.
    """
    module = benchmarks.find(benchmark)
    options = {name: value for name, value in options.items() if value is not None}
    benchmarks.check_options(module, options)
    if isinstance(model, str | Path):
        from puna import checkpoint

        model, its_tokenizer = checkpoint.load(checkpoint.resolve(model), device=device)
        tokenizer = tokenizer or its_tokenizer
    if model is not None and tokenizer is None:
        raise UsageError(
            f"{benchmark} needs the model's tokenizer too: evaluate(…, tokenizer=puna.load_tokenizer(folder))"
        )
    result: dict[str, Any] = module.evaluate(model=model, tokenizer=tokenizer, **options)
    return result
