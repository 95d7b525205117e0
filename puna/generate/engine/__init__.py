"""The engine: many completions at once, each as if it were alone.

    requests -> scheduler (blocks, chunks) -> one step of the network over all of them -> a token each -> text

`puna.generate.loop` is the plain way; whatever is asked of the engine, it gives the same tokens.
`docs/life_of_a_request.md` follows one request through the files here.
"""

from puna.generate.engine.engine import Engine

__all__ = ["Engine"]
