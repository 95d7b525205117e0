"""Training: recipe in, run folder out. The package is called like its function: `puna.train(recipe)`."""

from pathlib import Path
from typing import Any

from puna.config import Recipe, load_recipe
from puna.twins import make_callable

make_callable(__name__)


def train(
    recipe: Recipe | str | Path | dict[str, Any], overrides: list[str] | dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains as the recipe says, or continues a run that stopped.

    Args:
        recipe: a recipe, a shipped recipe's name, a YAML file, or its content.
        overrides: dotted fields and their values, as for `load_recipe`.

    Returns:
        {"run_dir", "step", "loss", "tokens", "seconds", …}: where the run is and its last numbers.

    Raises:
        UsageError: the recipe is wrong, or differs from the one that the run folder was made with.
        PunaError: data, weights or folder cannot be used; the loss is not finite several steps in a row.
    """
    recipe = load_recipe(recipe, overrides)
    from puna.train import run  # a wrong recipe is refused before torch is loaded

    return run.run(recipe)
