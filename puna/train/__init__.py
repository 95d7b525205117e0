"""Training: recipe in, run folder out. The package is called like its function: `puna.train(recipe)`."""

from typing import Any

from puna.twins import make_callable

make_callable(__name__)


def train(*args: Any, **options: Any) -> dict[str, Any]:
    """See `puna.train.run.train`."""
    from puna.train import run  # here, because it loads torch.distributed

    return run.train(*args, **options)
