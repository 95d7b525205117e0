"""`puna migrate`: a YAML of MindFormers becomes a recipe, and every key in it is accounted for.

`keys.py` says of every key where it went, or why it has no counterpart; `recipe.py` computes the recipe from the
values. What a YAML holds beyond these keys is named, never dropped in silence.
"""

from puna.migrate.migration import Migration, Translated, migrate
from puna.twins import make_callable

__all__ = ["Migration", "Translated", "migrate"]

make_callable(__name__)
