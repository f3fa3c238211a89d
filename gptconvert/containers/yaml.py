"""YAML, untrusted: the front matter of model cards, and flat configurations merged into one.

GPT-NeoX is configured by any number of YAML files, whose keys may be written with ``-`` or ``_`` and must not
contradict each other. Only plain data is read. Aliases, which can make a small file large, and duplicate keys are
refused.
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
_TAG = "tag:yaml.org,2002:"
#: Types of plain values besides strings, and the maximum length of one.
_PLAIN, _MAX_PLAIN = ("null", "bool", "int", "float", "timestamp"), 100
#: Numbers below the first are their own hash; integers from the second on become floats, as in JSON.
_MAX_KEY, _MAX_INTEGER = 1 << 53, 1 << 64
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
        # libyaml's parser is ten times as fast as Python's; wheels of PyYAML contain it.
        return _Builder(getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text), yaml, path).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise InputError(f"not YAML: {getattr(error, 'problem', None) or error}{where}", path=path) from error
    except (ValueError, RecursionError) as error:  # such as an impossible date
        raise InputError(f"not YAML: {error}", path=path) from error


def line_numbers(text: str) -> list[int]:
    """The lines, from 1, where the items of a document's outermost list begin. The document has been parsed."""
    import yaml

    found, depth = [], 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        ends = isinstance(event, yaml.CollectionEndEvent)
        depth -= ends
        if depth == 1 and not ends and isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            found.append(event.start_mark.line + 1)
        depth += isinstance(event, yaml.CollectionStartEvent)
    return found


class _Builder:
    """Builds plain data from the events of a loader, in one pass, and refuses what could take unbounded time.

    PyYAML's own constructors accept sexagesimal numbers of any length, in quadratic time, and keys of any type, which
    can be chosen so that all of them collide.
    """

    def __init__(self, loader: Any, yaml: Any, path: str) -> None:
        self.loader, self.yaml, self.path = loader, yaml, path

    def document(self) -> object:
        """The only document of the stream; None if it is empty."""
        yaml, loader = self.yaml, self.loader
        try:
            loader.get_event()  # the stream's start
            if loader.check_event(yaml.StreamEndEvent):
                return None
            loader.get_event()
            value = self.value(0)
            loader.get_event()
            if not loader.check_event(yaml.StreamEndEvent):
                raise self.wrong("more than one document", loader.peek_event())
            return value
        finally:
            loader.dispose()

    def value(self, depth: int) -> object:
        """The next value."""
        yaml, event = self.yaml, self.loader.get_event()
        if isinstance(event, yaml.AliasEvent):
            raise UnsafeInputError("refused YAML aliases", path=self.path, hint="write the values out")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if depth >= _MAX_DEPTH:
            raise UnsafeInputError(f"refused YAML nested more than {_MAX_DEPTH} deep", path=self.path)
        sequence = isinstance(event, yaml.SequenceStartEvent)
        if event.tag not in (None, "!", _TAG + ("seq" if sequence else "map")):
            raise self.wrong(f"the tag {event.tag!r:.80}", event)
        return self.sequence(depth + 1) if sequence else self.mapping(depth + 1)

    def sequence(self, depth: int) -> list[object]:
        values = []
        while not self.loader.check_event(self.yaml.SequenceEndEvent):
            values.append(self.value(depth))
        self.loader.get_event()
        return values

    def mapping(self, depth: int) -> dict[object, object]:
        found: dict[object, object] = {}
        while not self.loader.check_event(self.yaml.MappingEndEvent):
            start = self.loader.peek_event()
            key = self.value(depth)
            if not isinstance(key, (str, int, float, type(None))):
                raise self.wrong(f"a key of type {type(key).__name__}", start)
            if isinstance(key, (int, float)) and abs(key) >= _MAX_KEY:
                raise self.wrong("a key that is a large number", start)
            if key in found:
                raise self.wrong(f"duplicate key {key!s:.80}", start)
            found[key] = self.value(depth)
        self.loader.get_event()
        return found

    def scalar(self, event: Any) -> object:
        """A plain value of the type that its tag or form gives it."""
        yaml, tag = self.yaml, event.tag
        if tag in (None, "!"):
            tag = self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        kind = tag.removeprefix(_TAG)
        if kind in ("str", "merge", "value"):  # "<<" and "=", which YAML 1.1 gives meanings
            return event.value
        if kind not in _PLAIN or not tag.startswith(_TAG):
            raise self.wrong(f"the tag {tag!r:.80}", event)
        if len(event.value) > _MAX_PLAIN:
            raise self.wrong(f"a {kind} of {len(event.value)} characters", event)
        construct = getattr(self.loader, f"construct_yaml_{kind}")
        value = construct(yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark))
        return float(value) if kind == "int" and abs(value) >= _MAX_INTEGER else value

    def wrong(self, problem: str, event: Any) -> Exception:
        error: Exception = self.yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return error


def _number(value: object) -> object:
    """Text such as ``"1e-5"`` as a number; any other value unchanged."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
