"""The user's changes to a source: configuration keys set or ignored, tensors ignored."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gptconvert.errors import UsageError, short_repr
from gptconvert.model.names import collapse
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.model.tensors import TensorSet

#: Why an ignored tensor is not converted.
IGNORED = "ignored (--ignore-tensor)"


def edited_config(config: Mapping[str, object], options: Options) -> dict[str, object]:
    """The configuration without the ignored keys and with the keys that are set.

    A key of a nested object is named ``outer.inner``.
    """
    edited = dict(config)
    for name in options.ignore_key:
        path = _path(edited, name)
        if path is not None:
            _set(edited, path, ...)
    for text in options.set_key:
        name, _, value = text.partition("=")
        _set(edited, _path(edited, name) or tuple(name.split(".")), _parsed(value))
    return edited


def edit_config(source: Source, options: Options) -> Source:
    """The source with its configuration edited, and a note for each change.

    Raises:
        UsageError: there is no configuration, or it lacks a key to ignore.
    """
    if not options.ignore_key and not options.set_key:
        return source
    if not source.config:
        flag = "--ignore-key" if options.ignore_key else "--set"
        raise UsageError(
            f"{flag} changes the configuration, and this checkpoint has none",
            path=source.path,
            hint="describe the model with the options of the format (see --help)",
        )
    notes = [_ignored_key(source, name) for name in dict.fromkeys(options.ignore_key)]
    for text in options.set_key:
        name, _, value = text.partition("=")
        before = _get(source.config, _path(source.config, name))
        was = "" if before is ... else f" instead of {short_repr(before)}"
        notes.append(f"{name} is set to {short_repr(_parsed(value))}{was} (--set)")
    return replace(source, config=edited_config(source.config, options), notes=(*source.notes, *notes))


def without_ignored(
    tensors: TensorSet, options: Options, path: str, *, stored: Mapping[str, str] | None = None
) -> TensorSet:
    """The tensors whose names match none of ``options.ignore_tensor``; the others are listed as ignored.

    Args:
        tensors: by name.
        options: the patterns, as in :mod:`fnmatch`.
        path: of the source, used in error messages.
        stored: name → name in the file, where they differ; patterns match either.

    Raises:
        UsageError: a pattern matches no tensor.
    """
    dropped: dict[str, str] = {}
    for pattern in options.ignore_tensor:
        found = [n for n in tensors if _matches(n, pattern) or _matches((stored or {}).get(n, n), pattern)]
        if not found:
            near = _near(pattern, tensors)
            raise UsageError(
                f"--ignore-tensor {pattern} matches no tensor",
                path=path,
                found=", ".join(collapse(sorted(tensors))[:6]) or "no named tensors",
                hint=f"did you mean {near}? Patterns use * and ?" if near else "patterns use * and ?",
            )
        dropped |= dict.fromkeys(found, IGNORED)
    if not dropped:
        return tensors
    listed = collapse(sorted(dropped))
    names = ", ".join(listed[:6]) + (" …" if len(listed) > 6 else "")
    count = f"{len(dropped)} tensor{'s are' if len(dropped) > 1 else ' is'}"
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    note = f"{count} ignored (--ignore-tensor): {names}"
    return replace(tensors, tensors=kept, notes=(*tensors.notes, note), ignored=dropped)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def _ignored_key(source: Source, name: str) -> str:
    path = _path(source.config, name)
    if path is None:
        near = _near(name, _names(source.config))
        raise UsageError(
            f"--ignore-key {name}: the configuration has no such key",
            path=source.config_path or source.path,
            hint=f"did you mean {near}?" if near else "omit the option",
        )
    return f"{name} = {short_repr(_get(source.config, path))} is ignored (--ignore-key)"


def _near(name: str, names: Iterable[str]) -> str:
    return " or ".join(difflib.get_close_matches(name, list(names), 3, 0.6))


def _names(config: Mapping[str, object]) -> list[str]:
    inner = [f"{key}.{name}" for key, value in config.items() if isinstance(value, Mapping) for name in value]
    return [*config, *inner]


def _path(config: Mapping[str, object], name: str) -> tuple[str, ...] | None:
    """The keys that lead to ``name``; None if it is absent. Trainers spell ``_`` as ``-`` too."""
    for key in (name, name.replace("-", "_")):
        if key in config:
            return (key,)
        outer, _, inner = key.partition(".")
        nested = config.get(outer)
        if isinstance(nested, Mapping) and inner in nested:
            return (outer, inner)
    return None


def _get(config: Mapping[str, Any], path: tuple[str, ...] | None) -> Any:
    """The value at ``path``; ``...`` if there is none."""
    if path is None:
        return ...
    return config[path[0]] if len(path) == 1 else _get(config[path[0]], path[1:])


def _set(config: dict[str, object], path: tuple[str, ...], value: object) -> None:
    """Set the value at ``path`` in place, without changing nested objects in place; ``...`` removes the key."""
    key, *rest = path
    if rest:
        nested = config.get(key)
        inner = dict(nested) if isinstance(nested, Mapping) else {}
        _set(inner, tuple(rest), value)
        config[key] = inner
    elif value is ...:
        config.pop(key, None)
    else:
        config[key] = value


def _parsed(text: str) -> object:
    """The JSON value in ``text``, or ``text`` itself."""
    try:
        value: object = json.loads(text, parse_constant=_constant)
    except (ValueError, RecursionError):
        return text
    return value


def _constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")
