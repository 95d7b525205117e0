"""Every command's Python twin is there under its name, whatever was imported first."""

import importlib
from pathlib import Path

import pytest

import puna
from puna import cli


@pytest.mark.parametrize("name", [name for name in puna.__all__ if name != "__version__"])
def test_every_public_name_can_be_called(name: str) -> None:
    assert callable(getattr(puna, name))


def test_every_command_has_a_twin_but_those_that_show_something_to_people() -> None:
    commands = {file.stem for file in Path(cli.__file__).parent.glob("[!_]*.py")}
    assert commands - set(puna.__all__) == {"demo", "doctor", "inspect"}


@pytest.mark.parametrize("package", ["train", "generate", "evaluate", "adapt"])
def test_a_package_named_after_its_function_is_that_function(package: str) -> None:
    module = importlib.import_module(f"puna.{package}")
    with pytest.raises(TypeError, match=rf"{package}\(\) missing .* required positional argument"):
        module()
    assert getattr(puna, package) in (module, getattr(module, package))


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; it has .*train"):
        puna.trian  # noqa: B018
