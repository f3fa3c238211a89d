"""Flat YAML configurations, read without trust, several of which make up one.

GPT-NeoX is configured by any number of YAML files, whose keys may be written with ``-`` or ``_`` and must not
contradict each other. Only plain data is read; what makes a small file large (aliases) or ambiguous (a key twice)
is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from gptconvert.containers.untrusted import read_small
from gptconvert.errors import InputError, UnsafeInputError

MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
#: PyYAML reads YAML 1.1, where a number with an exponent needs a point; people, and JSON, leave it out.
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def read_yaml_configs(paths: Sequence[str]) -> dict[str, object]:
    """The keys of all files, ``-`` written as ``_``.

    Raises:
        InputError: a file is not YAML, no mapping, or two files contradict each other.
        UnsafeInputError: aliases, tags that name objects, or no regular file.
    """
    found: dict[str, object] = {}
    told: dict[str, str] = {}
    for path in paths:
        for key, value in _read(path).items():
            if key in found and found[key] != value:
                raise InputError(
                    "two values for one key",
                    path=path,
                    item=key,
                    expected=f"{found[key]!r:.80} as in {os.path.basename(told[key])}",
                    found=f"{value!r:.80}",
                    hint="name the file that counts with --hparams FILE",
                )
            found[key], told[key] = value, path
    return found


def _read(path: str) -> dict[str, object]:
    """One file's keys, ``-`` written as ``_``."""
    import yaml  # type: ignore[import-untyped]

    data = read_small(path, MAX_BYTES, "a configuration")
    try:
        text = data.decode("utf-8")
        _check_events(yaml, text, path)
        value = yaml.load(text, Loader=_loader(yaml))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", path=path) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise InputError(f"not YAML: {getattr(error, 'problem', None) or error}{where}", path=path) from error
    except (ValueError, RecursionError) as error:  # a date that does not exist, for one
        raise InputError(f"not YAML: {error}", path=path) from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError("wrong kind of value", path=path, expected="a mapping of names", found=type(value).__name__)
    keys = {key.replace("-", "_"): _number(entry) for key, entry in value.items()}
    if len(keys) < len(value):
        raise InputError("a key twice, written with - and with _", path=path)
    return keys


def _check_events(yaml: Any, text: str, path: str) -> None:
    """Refuse what could expand or nest without bound, before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UnsafeInputError("refused: YAML aliases", path=path, hint="write the values out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise UnsafeInputError(f"refused: nested more than {_MAX_DEPTH} deep", path=path)


def _loader(yaml: Any) -> Any:
    """PyYAML's safe loader, which builds plain data only, made to refuse a key that stands twice."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice}", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def _number(value: object) -> object:
    """``"1e-5"``, which YAML 1.1 takes for a text, as the number it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
