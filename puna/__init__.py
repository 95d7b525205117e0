"""puna: a team's own code model, from a folder of text to a trained, evaluated, exported model.

Every command but `demo`, `doctor` and `inspect` has its twin here: `puna.prepare(...)`, `puna.train(...)`,
`puna.load(...)`, `puna.generate(...)`, `puna.evaluate(...)`, `puna.export(...)`. Names are looked up when first used,
so `import puna` loads no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

#: Public name -> the module that holds it.
_HOMES = {
    "PunaError": "puna.errors",
    "Recipe": "puna.config",
    "ModelConfig": "puna.model.config",
    "load": "puna.checkpoint",
    "load_tokenizer": "puna.tokenizer",
    "prepare": "puna.data.prepare",
    "plan": "puna.plan",
    "launch": "puna.launch",
    "train": "puna.train",
    "export": "puna.checkpoint",
    "convert": "puna.checkpoint",
    "quantize": "puna.checkpoint",
    "migrate": "puna.migrate",
    "generate": "puna.generate",
    "Engine": "puna.generate.engine",
    "infill": "puna.generate",
    "chat": "puna.generate",
    "evaluate": "puna.evaluate",
    "compare": "puna.evaluate.comparing",
    "adapt": "puna.adapt",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'puna' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(_HOMES[name]), name)
