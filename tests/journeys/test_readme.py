"""The commands that the README shows do what they say, in the order in which it shows them.

They run as they stand, in a folder where `CodeLlama-7b-hf` is a tiny model, `~/src` a little code, and training is cut
to a few short steps by overrides behind the README's own words.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import puna
from puna.config import load_recipe
from puna.testing import write_tiny_tasks

ROOT = Path(puna.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: What makes the README's training short.
SHORT = (
    "steps=2 sequence_length=64 batch_tokens=128 precision=fp32 schedule.warmup_steps=1 validation.rows=2 "
    "recompute=none compile=false device=cpu"
)


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder with what the README takes for granted."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(tiny_model_folder, folder / "CodeLlama-7b-hf")
    (folder / "src").mkdir()
    library = Path(os.__file__).parent
    for file in sorted(file for part in ("json", "email", "asyncio") for file in (library / part).glob("*.py")):
        (folder / "src" / f"{file.parent.name}_{file.name}").write_bytes(file.read_bytes())
    shutil.copy(ROOT / "puna" / "demo" / "dialogs.json", folder / "alpaca.json")
    write_tiny_tasks(folder / "HumanEval.jsonl.gz", 1)
    return folder


def test_the_shell_commands_run(workshop: Path) -> None:
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "HOME": str(workshop), "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    lines = [line for block in blocks("sh")[1:] for line in block.splitlines() if line and not line.startswith("#")]
    assert len(lines) > 10
    for line in lines:
        if line.startswith("puna evaluate humaneval") and shutil.which("bwrap") is None:
            continue
        command = f"{line} {SHORT}" if line.startswith(("puna train", "puna adapt")) else line
        command = re.sub(r"(--max-tokens )\d+", r"\g<1>4", command)
        command = f"{command} --cases 3" if re.search("evaluate completion|puna adapt", command) else command
        command = f"{command} --max-tokens 4" if re.search("infill|chat exports|humaneval", command) else command
        done = subprocess.run(command, shell=True, cwd=workshop, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert (done.stdout + done.stderr).strip(), command
    assert (workshop / "exports" / "chat" / "model.safetensors").is_file()


def test_the_python_lines_run(workshop: Path, tmp_path: Path) -> None:
    for name in ("CodeLlama-7b-hf", "src"):
        (tmp_path / name).symlink_to(workshop / name)
    short = dict(pair.split("=") for pair in SHORT.split())
    code = blocks("python")[0].replace('"run_dir": "runs/mine"}', f'"run_dir": "runs/mine", **{short!r}}}')
    assert repr(short) in code
    code = code.replace("max_tokens=200", "max_tokens=4").replace('held_out")', 'held_out", cases=3)')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte" in done.stdout


def test_make_knows_the_two_commands() -> None:
    commands = re.findall(r"^make (\S+)", blocks("sh")[0], flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    for target in commands:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_place_that_the_readme_names_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    tables = [name for name in re.findall(r"`(puna/[\w/]+)/NAME\.\w+`", README)]
    for place in [*links, *tables]:
        assert (ROOT / place).exists(), place


def test_the_recipes_that_the_readme_trains_exist() -> None:
    for name in set(re.findall(r"puna train (\S+)", README)):
        load_recipe(name)
