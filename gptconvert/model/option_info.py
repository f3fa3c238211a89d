"""The metadata of one option: from it follow its flag, help, checks, and its words in a recorded command."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: When a field takes effect: opening files, reading the checkpoint, writing targets, or during the run.
Stage = Literal["source", "checkpoint", "output", "run"]
#: Section of the help text.
Group = Literal[
    "Source", "Checkpoint", "Output", "ONNX", "GGUF", "LiteRT", "safetensors and TensorFlow", "Verification"
]
#: Kind of value of an option; the command line shows this word and checks the value accordingly.
Metavar = Literal["N", "X", "SIZE", "FILE", "DIR", "NAME", "REVISION", "TASK", "PATTERN", "KEY=VALUE"]


@dataclass(frozen=True)
class OptionInfo:
    """Metadata of one field of :class:`Options`.

    Attributes:
        flag: command-line flag.
        stage: when it takes effect.
        group: section of the help text.
        help: help text, in the imperative.
        metavar: kind of value; None: a flag, or one of ``choices``.
        default_text: description of the default, shown in the help text.
        shapes: whether it changes the output; if so, the manifest and the card's command record it.
        targets: targets that use it; empty: all.
        choices: allowed values; empty: any.
        minimum: smallest allowed number.
        placeholder: replaces a local path in the card's command.
        repo: whether the value may name a hub repository instead of a local path.
    """

    flag: str
    stage: Stage
    group: Group
    help: str
    metavar: Metavar | None = None
    default_text: str | None = None
    shapes: bool = True
    targets: frozenset[str] = frozenset()
    choices: tuple[object, ...] = ()
    minimum: int = 0
    placeholder: str | None = None
    repo: bool = False

    @property
    def is_flag(self) -> bool:
        """Whether it takes no value. (``--to`` does, but is a tuple.)"""
        return self.metavar is None and not self.choices

    def checked(self, default: object, value: Any) -> Any:
        """The value of an option, in its field's type.

        Raises:
            ValueError: it is invalid; the message describes valid values.
        """
        if self.metavar == "SIZE" and isinstance(value, str):
            return parse_size(value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if self.choices and not isinstance(default, tuple):
            if value not in self.choices:
                raise ValueError(f"one of {', '.join(map(str, self.choices))}")
            return value
        kinds: Mapping[str, type] = {"N": int, "SIZE": int, "X": float}
        kind = bool if self.is_flag else kinds.get(self.metavar or "", str)
        if isinstance(default, tuple):
            if not isinstance(value, tuple | list) or not all(isinstance(each, str) and each for each in value):
                raise ValueError("a tuple of text")
            if default and not value:
                raise ValueError("at least one")
            if self.choices and not all(each in self.choices for each in value):
                raise ValueError(f"one of {', '.join(map(str, self.choices))}")
            if self.metavar == "KEY=VALUE" and not all(each.partition("=")[0] and "=" in each for each in value):
                raise ValueError("KEY=VALUE, such as n_head=12")
            if self.metavar == "KEY=VALUE" and len({each.partition("=")[0] for each in value}) < len(value):
                raise ValueError("each key once")
            return tuple(value)
        if kind is int and hasattr(value, "__index__") and not isinstance(value, bool):
            value = operator.index(value)  # NumPy's integers too
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            words = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
            raise ValueError(words[kind])
        if value == "" and self.flag != "--scope":  # names without a prefix
            raise ValueError("text that is not empty")
        if isinstance(value, int | float) and not self.minimum <= value < math.inf:
            raise ValueError(f"at least {self.minimum}")
        return value

    def is_local(self, value: object) -> bool:
        """Whether a value is a local path, which the output does not record."""
        return self.placeholder is not None and isinstance(value, str) and (not self.repo or os.path.exists(value))

    def words(self, value: object) -> list[str]:
        """Command-line words for one option."""
        if value is False or value is None:  # switches off a default
            return [self.flag.replace("--", "--no-", 1)]
        if value is True:
            return [self.flag]
        if isinstance(value, tuple):
            return [word for each in value for word in (self.flag, str(each))]
        return [self.flag, str(self.placeholder if self.is_local(value) else value)]


def option(default: object, flag: str, stage: Stage, group: Group, about: str, **info: Any) -> Any:
    """A field of ``Options`` with its :class:`OptionInfo`."""
    return field(default=default, metadata={"info": OptionInfo(flag, stage, group, about, **info)})


#: Multiples of a byte.
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(text: str) -> int:
    """The bytes in ``5GB``, ``500MB``, ``1GiB`` or a number of bytes.

    Raises:
        ValueError: not a size, or not positive.
    """
    number = text.strip().rstrip("KMGIBkmgib")
    try:
        size = int(float(number) * UNITS[text.strip()[len(number) :].upper()])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError("a positive number, alone or with KB, MB, GB, KiB, MiB or GiB, such as 5GB")
    return size
