"""YAML, untrusted: the front matter of model cards, and flat configurations merged into one.

GPT-NeoX is configured by any number of YAML files, whose keys may be written with ``-`` or ``_`` and must not
contradict each other. Only plain data is read. Aliases, which can make a small file large, and duplicate keys are
refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gptconvert.containers.untrusted import read_small
from gptconvert.errors import InputError, UnsafeInputError

MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
#: A number with an exponent but no decimal point: text in YAML 1.1, which PyYAML implements, but common in practice.
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def read_yaml_configs(paths: Sequence[str]) -> dict[str, object]:
    """The keys of all files, with ``-`` replaced by ``_``.

    Raises:
        InputError: a file is not YAML or not a mapping, a tag names an object, or two files contradict each other.
        UnsafeInputError: aliases, nested too deep, or not a regular file.
    """
    merged: dict[str, object] = {}
    origin: dict[str, str] = {}
    for path in paths:
        for key, value in _read(path).items():
            if key in merged and merged[key] != value:
                raise InputError(
                    "two values for one key",
                    path=path,
                    item=key,
                    expected=f"{merged[key]!r:.80} as in {os.path.basename(origin[key])}",
                    found=f"{value!r:.80}",
                    hint="choose the file to use with --hparams FILE",
                )
            merged[key], origin[key] = value, path
    return merged


def _read(path: str) -> dict[str, object]:
    """One file's keys, with ``-`` replaced by ``_``."""
    data = read_small(path, MAX_BYTES, "a configuration")
    try:
        value = parse_yaml(data.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", path=path) from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError("wrong kind of value", path=path, expected="a mapping of names", found=type(value).__name__)
    keys = {key.replace("-", "_"): _number(entry) for key, entry in value.items()}
    if len(keys) < len(value):
        raise InputError("duplicate key, written with - and with _", path=path)
    return keys


def parse_yaml(text: str, path: str) -> object:
    """The plain data of a YAML document.

    Args:
        text: the document, of limited size.
        path: the file it came from, used in error messages.

    Raises:
        InputError: not YAML, a duplicate key, or a tag names an object.
        UnsafeInputError: aliases, or nested too deep.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        _check_events(yaml, text, path)
        return yaml.load(text, Loader=_loader(yaml))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise InputError(f"not YAML: {getattr(error, 'problem', None) or error}{where}", path=path) from error
    except (ValueError, RecursionError) as error:  # such as an impossible date
        raise InputError(f"not YAML: {error}", path=path) from error


def _check_events(yaml: Any, text: str, path: str) -> None:
    """Refuse aliases and deep nesting before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UnsafeInputError("refused YAML aliases", path=path, hint="write the values out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise UnsafeInputError(f"refused YAML nested more than {_MAX_DEPTH} deep", path=path)


def _loader(yaml: Any) -> Any:
    """PyYAML's safe loader, which builds plain data only, extended to refuse duplicate keys."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            duplicate = next((name for name, count in names.items() if count > 1), None)
            if duplicate is not None:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {duplicate}", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def _number(value: object) -> object:
    """Text such as ``"1e-5"`` as a number; any other value unchanged."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
