r"""From what a model wrote to the code that is judged: cut at stop strings, or taken out of a chat answer by parsing.

A base model continues a prompt, and goes on past the function: `cut` ends it. An Instruct model answers in prose with
fenced code somewhere, and searching for "```" or for the first "def" gives a score near 0 as soon as a model writes
otherwise. `code_of` therefore gathers what could be code, and takes what parses and defines the function:

    "Sure:\n```python\ndef add(x, y):\n    return x + y\n```\nIt adds."   ->   "def add(x, y):\n    return x + y\n"
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence

#: A fenced block: Markdown's, also where the answer breaks off inside it; or that of Code Llama's MBPP prompt.
FENCES = (
    re.compile(r"^[ \t]*(```+|~~~+)[^\n`]*\n(?P<code>.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE),
    re.compile(r"\[PYTHON\](?P<code>.*?)(?:\[/PYTHON\]|\Z)", re.DOTALL),
)


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stop strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def code_of(answer: str, name: str) -> str | None:
    """The Python program in an answer that defines `name`.

    Of the candidates - each fenced block with what it uses of others, all blocks together, the whole answer, and what
    is left of it without the prose around the first definition - the first that parses and defines `name` is taken, or
    the first that does more than repeat its signature; None if none does.
    """
    found = [code for code in _candidates(answer, name) if defines(code, name)]
    return next((code for code in found if not _is_stub(code, name)), found[0] if found else None)


def defines(code: str, name: str) -> bool:
    """Whether a text is Python that defines or assigns `name` at its top."""
    tree = parsed(code)
    return tree is not None and any(name in _names(node) for node in tree.body)


def parsed(code: str) -> ast.Module | None:
    """The syntax tree of a text, or None if it is not Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes in a model's strings
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def preamble(prompt: str, name: str) -> str:
    """What stands in a prompt before the function `name`: imports and helpers that a whole program may leave out."""
    head = re.search(rf"^(?:async )?def {re.escape(name)}\b", prompt, re.MULTILINE)
    before = prompt[: head.start()] if head else ""
    return before if parsed(before) is not None else ""


def _candidates(answer: str, name: str) -> Iterator[str]:
    for fence in FENCES:
        blocks = [textwrap.dedent(match["code"]).strip("\n") + "\n" for match in fence.finditer(answer)]
        yield from (_with_helpers(block, blocks) for block in blocks)
        yield "\n".join(blocks)
    yield textwrap.dedent(answer)
    yield from _unfenced(answer, name)


def _with_helpers(block: str, blocks: Sequence[str]) -> str:
    """A block behind those imports, functions and classes of the other blocks that it uses, and that those use."""
    tree = parsed(block)
    if tree is None:
        return block
    own = {name for node in tree.body for name in _names(node) | _imported(node)}
    offered = {
        name: (node, _source(other, node))
        for other in blocks
        if other != block
        for node in getattr(parsed(other), "body", [])
        if not isinstance(node, ast.Assign)  # which may be an example of how it is called
        for name in (_names(node) | _imported(node)) - own
    }
    wanted, taken = _used(tree), {}
    while names := [name for name in offered if name in wanted and name not in taken]:
        for name in names:
            node, taken[name] = offered[name]
            wanted |= _used(node)
    helpers = dict.fromkeys(text for name in offered if (text := taken.get(name)) is not None)
    return "\n".join([*helpers, block])


def _used(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _is_stub(code: str, name: str) -> bool:
    """Whether the function is there, but all that it has for a body is a docstring, `pass` or `...`."""
    tree = parsed(code)
    functions = [node for node in getattr(tree, "body", []) if isinstance(node, ast.FunctionDef) and node.name == name]
    return bool(functions) and all(
        isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in functions[-1].body
    )


def _unfenced(answer: str, name: str) -> Iterator[str]:
    """The answer from its first import or definition on, or from that of `name`, as far as it is Python."""
    lines = answer.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if re.match(r"(import|from|def|class|async)\b|@", line)), None)
    head = next((i for i, line in enumerate(lines) if re.match(rf"(async )?def {re.escape(name)}\b", line)), None)
    for start in dict.fromkeys(at for at in (first, head) if at is not None):
        yield _beginning(lines[start:])


def _beginning(lines: list[str]) -> str:
    """The longest beginning that is Python, near enough: each error says in which line to end."""
    while lines:
        try:
            with warnings.catch_warnings(action="ignore"):
                ast.parse("".join(lines))
            break
        except SyntaxError as error:
            lines = lines[: min(len(lines), error.lineno or len(lines)) - 1]
        except (ValueError, RecursionError, MemoryError):
            return ""
    return "".join(lines)


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def _imported(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return set()


def _source(code: str, node: ast.stmt) -> str:
    """The lines of a statement, with its decorators."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return "\n".join(code.split("\n")[first - 1 : node.end_lineno])
