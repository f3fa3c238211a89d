"""The documents beside a checkpoint: licence files, and the model card with its metadata.

Both are optional and written by strangers, so a fault in one is a note, and never stops a conversion. The card's
front matter is the YAML between two lines ``---`` at the top of README.md; its keys are those of the hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gptconvert.containers.untrusted import read_small
from gptconvert.containers.yaml import parse_yaml
from gptconvert.errors import GptConvertError

CARD = "README.md"
MAX_BYTES = 4 << 20
MAX_LICENCE = 16 << 20
#: PyYAML takes about a second for this many characters.
MAX_FRONT_MATTER = 128 << 10
MAX_TEXT, MAX_LIST = 200, 100
_LICENCE = re.compile(r"(?:model[_-])?(?:un)?(?:licen[cs]e|copying|notice)(?:[._-].*)?", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|$)", re.DOTALL)
#: Front matter keys that are carried, and whether the value may be a list.
KEYS: Mapping[str, bool] = {
    "model_name": False,
    "license": True,
    "license_name": False,
    "license_link": False,
    "language": True,
    "base_model": True,
    "datasets": True,
    "tags": True,
}


def is_licence(name: str) -> bool:
    """Whether a file of this name states a licence (``LICENSE.txt``, ``NOTICE``, ``COPYING``)."""
    return _LICENCE.fullmatch(name) is not None and not name.endswith((".py", ".json"))


def is_document(name: str) -> bool:
    """Whether a file of this name is read for the model card of the output."""
    return name == CARD or is_licence(name)


def largest_document(name: str) -> int:
    """Largest size, in bytes, of a document that is read."""
    return MAX_BYTES if name == CARD else MAX_LICENCE


def read_card(path: str) -> tuple[dict[str, object], tuple[str, ...]]:
    """The metadata of a README.md: the known keys whose values are text or lists of text; and notes for the user."""
    try:
        text = read_small(path, MAX_BYTES, "a model card").decode("utf-8-sig").replace("\r\n", "\n")
        matter = _FRONT_MATTER.match(text)
        head = (matter[1] or "") if matter else ""
        if len(head) > MAX_FRONT_MATTER:
            return {}, (f"the metadata of {CARD} was left behind: longer than {MAX_FRONT_MATTER} characters",)
        raw = parse_yaml(head, path)
    except (GptConvertError, UnicodeDecodeError) as error:
        reason = error.message if isinstance(error, GptConvertError) else "not UTF-8"
        return {}, (f"the metadata of {CARD} was left behind: {reason}",)
    if not isinstance(raw, dict):
        return {}, ()
    index: Any = raw.get("model-index")  # the Trainer of transformers writes the model's name there
    name = index[0].get("name") if isinstance(index, list) and index and isinstance(index[0], dict) else None
    found = {"model_name": name, **raw}
    card = {key: _value(found[key], several) for key, several in KEYS.items() if key in found}
    return {key: value for key, value in card.items() if value}, ()


def _value(value: object, several: bool) -> str | list[str] | None:
    """Text, or a list of text; None for values of other types."""
    if isinstance(value, list) and several:
        return [text for text in map(_text, value[:MAX_LIST]) if text]
    return _text(value)


def _text(value: object) -> str | None:
    """Text of limited length; None for other types. YAML reads ``no``, the code of Norwegian, as false."""
    value = "no" if value is False else value
    return value[:MAX_TEXT] if isinstance(value, str) else None
