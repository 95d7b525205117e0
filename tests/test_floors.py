"""Imports point down the floors, siblings do not know each other, and what must start quickly loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import puna

PACKAGE = Path(puna.__file__).parent

#: Rooms by floor, from the ground up. A room may import what lies below it, and itself.
FLOORS: list[set[str]] = [
    {"errors", "twins"},
    {"files", "garbage", "progress"},
    {"tokenizer", "prompts", "config", "devices", "native", "log", "story"},
    {"data", "model"},
    {"quantized"},
    {"checkpoint", "parallel"},
    {"train", "generate", "plan", "launch", "migrate"},
    {"evaluate"},
    {"cli", "demo", "adapt", "report", "testing", "__main__", "__init__"},
]

#: Neighbours that may be named all the same, and why.
DOORS = {
    ("prompts", "tokenizer"),  # layouts are laid out in tokens
    ("cli", "demo"),  # the command starts the story
    ("cli", "adapt"),
    ("cli", "report"),
    ("demo", "report"),  # the story ends in one
    ("adapt", "report"),
    ("__main__", "cli"),
}


def rooms_imported() -> dict[str, set[str]]:
    """Room -> the rooms that it names, at the top of a file or inside a function."""
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        room = relative.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "puna" and len(parts) > 1 and _is_room(parts[1]):
                    graph.setdefault(room, set()).add(parts[1])
        graph.setdefault(room, set())
    return graph


def _is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def test_imports_point_down_the_floors() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for room, imported in sorted(rooms_imported().items()):
        print(f"{floor.get(room, '?')} {room:10} -> {', '.join(sorted(imported - {room}))}")
        assert room in floor, f"puna/{room} stands on no floor; give it one in tests/test_floors.py"
        for other in imported - {room}:
            if floor[other] >= floor[room] and (room, other) not in DOORS:
                wrong.append(f"{room} imports {other}")
    assert not wrong


def test_every_room_of_the_plan_exists() -> None:
    assert {room for rooms in FLOORS for room in rooms if not _is_room(room)} == set()


def _modules_after(code: str) -> set[str]:
    script = f"import sys; {code}; print(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_puna_loads_neither_torch_nor_numpy() -> None:
    assert {"torch", "numpy", "pydantic"}.isdisjoint(_modules_after("import puna"))


def test_the_help_of_the_command_line_loads_neither_torch_nor_numpy() -> None:
    code = "import contextlib, io, puna.cli\nwith contextlib.redirect_stdout(io.StringIO()): puna.cli.run(['--help'])\n"
    script = f"{code}print(*__import__('sys').modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "numpy", "pydantic", "pyarrow"}.isdisjoint(loaded)
    assert "puna.cli.train" in loaded


def test_data_is_prepared_without_torch() -> None:
    loaded = _modules_after("import puna.data.prepare, puna.data.loader, puna.tokenizer, puna.prompts")
    assert "torch" not in loaded


def test_answers_are_judged_and_results_compared_without_recipes() -> None:
    assert {"torch", "pydantic"}.isdisjoint(_modules_after("import puna.evaluate.programs, puna.evaluate.comparing"))
