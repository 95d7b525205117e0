"""A story told stage by stage: each is numbered, timed, remembered, and told once.

The folder's `stages.json` holds what every finished stage came to. Told again, a story passes over those, and goes on
where it was broken off; told with other settings, it asks for another folder. A newer version of puna goes on too: each
stage names the version that did it, and that the stages have several is said.
"""

import json
import shlex
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import puna
from puna.errors import PunaError
from puna.files import read_json, write_json
from puna.progress import say

FILE = "stages.json"

#: What a stage comes to: `said`, a line for the reader, `command`, what does the same, and whatever the report needs.
Outcome = dict[str, Any]


def holds_story(folder: Path) -> bool:
    """Whether a folder is a story's."""
    try:
        return read_json(folder / FILE).keys() >= {"settings", "stages"}
    except (PunaError, OSError):
        return False


class Story:
    """Stages in a folder, one story at a time.

    Args:
        folder: made if need be.
        settings: what all stages depend on, as JSON.
        stages: how many there will be.

    Raises:
        PunaError: the folder holds something else, or a story with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, stages: int) -> None:
        self.folder, self.total = folder, stages
        self.settings = json.loads(json.dumps(dict(settings)))  # as they will be read again: a tuple is a list there
        self.stages: list[dict[str, Any]] = []
        self._finished: dict[str, dict[str, Any]] = {}
        if (folder / FILE).exists():
            before = read_json(folder / FILE)
            changed = [name for name, value in self.settings.items() if before["settings"].get(name) != value]
            if changed and before["stages"]:
                raise PunaError(f"{folder} was made with other {', '.join(changed)}; remove it or choose another place")
            self._finished = {stage["name"]: stage for stage in before["stages"]}
            for stage in before["stages"]:
                stage.setdefault("puna", before["settings"].get("puna"))  # earlier versions wrote it once for all
            if others := self._others(before["stages"]):
                say(f"stages of {folder} were done by puna {', '.join(others)}; {puna.__version__} does the others")
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise PunaError(f"{folder} exists and holds something else; choose another place with -o")
        folder.mkdir(parents=True, exist_ok=True)
        if not self._finished:  # from here on the folder is a story's, wherever that is broken off
            self._remember()

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """Name of a stage's function -> what it came to."""
        return {stage["name"]: stage["outcome"] for stage in self.stages}

    @property
    def earlier(self) -> dict[str, str]:
        """For a report: the other versions of puna that did stages, if any did."""
        others = self._others(self.stages)
        return {"puna, of earlier stages": ", ".join(others)} if others else {}

    def stage(self, title: str, tell: Callable[..., Outcome], *arguments: Any) -> None:
        """Does what a stage does, `tell(*arguments)`, unless it was done before, and says so."""
        say(f"\n[{len(self.stages) + 1}/{self.total}] {title}")
        stage = self._finished.get(tell.__name__)
        if stage is not None:
            self.stages.append(stage)
            say(f"    done before: {stage['outcome']['said']}")
            return
        started = time.monotonic()
        outcome = tell(*arguments)
        seconds = time.monotonic() - started
        name, version = tell.__name__, puna.__version__
        self.stages.append({"name": name, "title": title, "seconds": seconds, "puna": version, "outcome": outcome})
        self._remember()
        say(textwrap.indent(outcome["command"], "    "))
        say(f"    {outcome['said']} ({seconds:.1f} s)")

    @staticmethod
    def _others(stages: list[dict[str, Any]]) -> list[str]:
        return list(dict.fromkeys(str(stage["puna"]) for stage in stages if stage["puna"] != puna.__version__))

    def _remember(self) -> None:
        write_json(self.folder / FILE, {"settings": self.settings, "stages": self.stages})


def command(*words: object, **options: object) -> str:
    """A command line: `command("prepare", "code", "src", fim_rate=0.9)` is "puna prepare code src --fim-rate 0.9".

    A mapping among the words becomes dotted overrides, field.name=value.
    """
    line = ["puna"]
    for word in words:
        line += [f"{name}={value}" for name, value in word.items()] if isinstance(word, Mapping) else [str(word)]
    for name, value in options.items():
        line += [f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(line)
