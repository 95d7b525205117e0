"""Finding a chat template: by name, one file each in `puna/prompts/chat/`, or the one that a model ships."""

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from puna.errors import PunaError, UsageError
from puna.files import read_json
from puna.prompts import chat
from puna.prompts.dialog import ChatTemplate
from puna.tokenizer import Tokenizer
from puna.tokenizer.base import TEMPLATE_FILE


def template_names() -> list[str]:
    """The templates that come with puna."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(chat.__path__))


def chat_template(name_or_folder: str | Path) -> ChatTemplate:
    """The template of this name, or the one in a model's folder.

    A folder's template is `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.

    Raises:
        UsageError: neither a name nor a folder.
        PunaError: the folder ships no template, or one that cannot be read.
    """
    if str(name_or_folder) in template_names():
        module = importlib.import_module(f"puna.prompts.chat.{str(name_or_folder).replace('-', '_')}")
        return module.TEMPLATE
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise UsageError(
            f"{name_or_folder} is neither a chat template ({', '.join(template_names())}) nor a model's folder"
        )
    settings = _settings(folder)
    source = _source(folder, settings)
    if source is None:
        raise PunaError(f"{folder} ships no chat template; name one of {', '.join(template_names())}")
    from puna.prompts.jinja import JinjaTemplate

    return JinjaTemplate(source, name=str(folder), specials=_special_texts(settings))


def ships_template(folder: Path) -> bool:
    """Whether a model's folder ships a chat template."""
    return _source(folder, _settings(folder)) is not None


def with_specials_of(template: ChatTemplate, tokenizer: Tokenizer) -> ChatTemplate:
    """A model's own template with BOS and EOS written as the files of another tokenizer say."""
    from puna.prompts.jinja import JinjaTemplate

    assert template.jinja is not None
    specials = {"bos_token": tokenizer.piece(tokenizer.bos_id), "eos_token": tokenizer.piece(tokenizer.eos_id)}
    if settings := _settings(tokenizer.path.parent):
        specials = _special_texts(settings)
    return JinjaTemplate(template.jinja, name=template.name, specials=specials)


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            settings |= read_json(folder / file)
    return settings


def _source(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source


def _special_texts(settings: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like, which templates write by name."""
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}
