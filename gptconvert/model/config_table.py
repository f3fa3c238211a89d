"""Configuration tables: one line per key, used for both reading and writing a configuration file.

A :class:`ConfigTable` belongs to one file format of one family, as a ``Scheme`` does for tensors. Every key of a file
is handled, harmless, set to the value that switches its feature off, or rejected by name: an unknown key could
change the logits, so none is ignored.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar

from gptconvert.errors import GptConvertError, InputError, UnsupportedError
from gptconvert.model.config_kinds import TOKEN, TOKENS, Kind, wrong
from reference_model.config import ConfigError, GPTConfig

T = TypeVar("T")
#: Values read, by :attr:`Key.field`.
Values = Mapping[str, Any]

#: Default of a required key.
REQUIRED: Final = object()
FIELDS: Final = frozenset(field.name for field in dataclasses.fields(GPTConfig))
#: Special ids, which do not affect the architecture: carried over in the file's terms.
SPECIAL_IDS: Final[Mapping[str, Kind]] = {"bos_token_id": TOKEN, "eos_token_id": TOKENS}
#: Key of a feature that is not implemented → what to do, if there is more to say than that it changes the logits.
ADVICE: Final[Mapping[str, str]] = {
    "quantization_config": "transformers would quantise these float weights on loading; "
    "to convert them as stored, pass --ignore-key quantization_config",
}
#: One more than the layer limit of a configuration, so that a damaged count is rejected before it exhausts memory.
MAX_LAYERS: Final = 10_001
#: Most keys that one message lists.
MAX_LISTED: Final = 50


@dataclass(frozen=True)
class Key:
    """One key of a configuration file.

    Attributes:
        name: name in the file; ``outer.inner`` for a key of a nested object.
        field: the field of :class:`GPTConfig` that it sets, or another name, for use in ``ConfigTable.derived``;
            None: the value is checked but not kept.
        kind: kind of value.
        default: value in the file's terms where the key is absent, or a function of the values of the keys before
            this one; None: the value is then None.
        aliases: other names, read but not written. If several names are present, their values must agree.
        repeats: aliases that are also written, because other programs read them.
        of: value to write, if it is not the field itself. A key with neither is not written.
        sparse: whether it is left out of the file if its value is None.
    """

    name: str
    field: str | None
    kind: Kind
    default: object = REQUIRED
    aliases: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ()
    of: Callable[[GPTConfig], object] | None = None
    sparse: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every accepted name, the key's own first."""
        return (self.name, *self.aliases, *self.repeats)


@dataclass(frozen=True)
class ConfigTable:
    """All keys of one kind of configuration file.

    Attributes:
        keys: keys that affect the model, in reading order.
        harmless: keys that do not affect the output; they are carried over.
        pattern: regular expression of further harmless keys.
        unused: key of a feature that is not implemented → the value that switches it off, the only one accepted.
        writes: harmless or unused key → value to write if none is carried over.
        derived: field of :class:`GPTConfig`, or one of :data:`SPECIAL_IDS` → function of the values read. Overrides
            :data:`USUAL`.
    """

    keys: tuple[Key, ...]
    harmless: Collection[str] = ()
    pattern: str = "(?!)"
    unused: Mapping[str, object] = field(default_factory=dict)
    writes: Mapping[str, object] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Values], object]] = field(default_factory=dict)

    @cached_property
    def handled(self) -> frozenset[str]:
        """All names of all keys."""
        return frozenset(name for key in self.keys for name in key.names)

    def is_harmless(self, key: str) -> bool:
        """Whether a key does not affect the output."""
        is_known = key in self.handled or key in self.unused
        return key in self.harmless or (not is_known and re.fullmatch(self.pattern, key) is not None)

    def read(
        self, raw: Mapping[str, object], path: str | None, *, defaults: Mapping[str, object] | None = None
    ) -> Reading:
        """The values of a file.

        Args:
            raw: the parsed file.
            path: the file, used in error messages.
            defaults: field → default that replaces the key's own.

        Raises:
            InputError: a required key is missing, a value is of the wrong kind, or two names of one key disagree.
            UnsupportedError: a value selects a feature that is not implemented.
        """
        with _in_file(path):
            flat, values = _flattened(raw, self.handled), dict[str, Any]()
            for key in self.keys:
                value = _value(key, flat, (defaults or {}).get(key.field or "", key.default), values)
                if key.field is not None:
                    values[key.field] = value
        return Reading(self, flat, path, values)

    def write(self, config: GPTConfig, carried: Mapping[str, object]) -> dict[str, object]:
        """The file's keys, from the configuration and the harmless keys carried over."""
        written = {**self.writes, **carried}
        for key in self.keys:
            if key.of is None and key.field not in FIELDS:
                continue
            meaning = key.of(config) if key.of is not None else getattr(config, key.field or "")
            if meaning is None and key.sparse:
                continue
            value, word = key.kind.write(meaning), carried.get(key.name)
            if key.kind.has_synonyms and word is not None and key.kind.read(key.name, word) == meaning:
                value = word
            for name in (key.name, *key.repeats):
                outer, _, inner = name.rpartition(".")
                if outer:
                    nested = written.get(outer)
                    written[outer] = {**(nested if isinstance(nested, Mapping) else {}), inner: value}
                else:
                    written[name] = value
        return written


@dataclass(frozen=True)
class Reading:
    """A configuration file that was read.

    Attributes:
        table: the table used to read it.
        raw: the parsed file, with nested objects of handled keys flattened.
        path: the file, used in error messages.
        values: the values read, by field.
    """

    table: ConfigTable
    raw: Mapping[str, object]
    path: str | None
    values: Values

    @property
    def carried(self) -> dict[str, object]:
        """The harmless keys to carry over, and the words of the file that have synonyms."""
        table = self.table
        harmless = {k: v for k, v in self.raw.items() if table.is_harmless(k) and k not in table.handled}
        words = {
            key.name: self.raw[name]
            for key in table.keys
            for name in reversed(key.names)
            if key.kind.has_synonyms and name in self.raw
        }
        return {**harmless, **words}

    def special_ids(self, config: GPTConfig) -> dict[str, object]:
        """:data:`SPECIAL_IDS` as config.json states them, null if unknown. ``config`` is that of :meth:`config`."""
        known = {**self.values, **vars(config)}
        stated = {name: kind.write(self.values.get(name)) for name, kind in SPECIAL_IDS.items()}
        return stated | {name: derive(known) for name, derive in self.table.derived.items() if name in SPECIAL_IDS}

    def config(self, **decided: object) -> GPTConfig:
        """The configuration; ``decided`` adds to or overrides the values read.

        Raises:
            InputError: the configuration is invalid.
            UnsupportedError: keys are not handled, harmless or switched off; the message lists all of them.
        """
        known = {**self.values, **decided}
        with _in_file(self.path):
            functions = {**USUAL, **self.table.derived}
            derived = {name: derive(known) for name, derive in functions.items() if name in FIELDS}
            config = GPTConfig(**{**{name: known[name] for name in FIELDS & known.keys()}, **derived})
            self._refuse_unknown()
        return config

    def _refuse_unknown(self) -> None:
        table, unused = self.table, self.table.unused
        left = [key for key in self.raw if key not in table.handled and not table.is_harmless(key)]
        unknown = {key for key in left if key not in unused and self.raw[key] is not None}
        selected = [key for key in left if key in unused and not _same(self.raw[key], unused[key])]
        refused = unknown.union(selected)
        rejected = [key for key in left if key in refused]
        if rejected:
            listed = ", ".join(f"{key} = {self.raw[key]!r}"[:120] for key in rejected[:MAX_LISTED])
            listed += f" and {len(rejected) - MAX_LISTED} more" if len(rejected) > MAX_LISTED else ""
            flags = " ".join(f"--ignore-key {shlex.quote(key[:100])}" for key in rejected[:MAX_LISTED])
            known = "; ".join(ADVICE.get(key, f"{key} would change the logits") for key in selected)
            raise UnsupportedError(
                f"configuration keys not implemented: {listed}",
                hint=known if selected else f"an unknown key could change the logits; if it does not, pass {flags}",
            )


def _value(key: Key, raw: Mapping[str, object], default: object, values: Values) -> Any:
    found = [name for name in key.names if name in raw]
    if any(raw[name] != raw[found[0]] for name in found[1:]):
        pairs = ", ".join(f"{name} = {raw[name]!r}" for name in found)
        raise InputError(f"keys with the same meaning disagree: {pairs}")
    value = raw[found[0]] if found else default(values) if callable(default) else default
    if value is None and (key.kind.nullable or not found):
        return None
    if value is REQUIRED:
        raise InputError("required key is missing", item=key.name)
    if value is None:
        raise InputError("the value must not be null", item=found[0])
    return key.kind.read(found[0] if found else key.name, value)


def _flattened(raw: Mapping[str, object], names: Collection[str]) -> dict[str, object]:
    """The file with ``outer.inner`` keys in place of the objects that contain one of ``names``."""
    flat = dict(raw)
    for outer in {name.rpartition(".")[0] for name in names} - {""}:
        nested = flat.pop(outer, None)
        if nested is not None and not isinstance(nested, Mapping):
            raise wrong(outer, "an object", nested)
        flat |= {f"{outer}.{inner}": value for inner, value in (nested or {}).items()}
    return flat


@contextmanager
def _in_file(path: str | None) -> Iterator[None]:
    """Add the file to errors raised inside; turn errors of :class:`GPTConfig` into input errors."""
    try:
        yield
    except ConfigError as error:
        raise InputError(error.why, path=path, item=error.key, found=repr(error.value)) from error
    except GptConvertError as error:
        error.path = error.path or path
        raise


def _same(value: object, unused: object) -> bool:
    return value == unused or (not value and not unused)


# --- derived fields ------------------------------------------------------------------------------------------------


def per_layer(value: T, layers: int) -> tuple[T, ...]:
    """``value`` for every layer."""
    return (value,) * min(layers, MAX_LAYERS)


def usual_scale(width: int, heads: int) -> float:
    """1 / √(features per head); 1 for invalid sizes, which are rejected later."""
    return float((width / heads) ** -0.5) if width > 0 and heads > 0 else 1.0


#: Defaults: an MLP of width 4 D, scores divided by √(features per head), global attention.
USUAL: Final[Mapping[str, Callable[[Values], object]]] = {
    "n_inner": lambda v: 4 * v["n_embd"] if v.get("n_inner") is None else v["n_inner"],
    "attn_scale": lambda v: per_layer(usual_scale(v["n_embd"], v["n_head"]), v["n_layer"]),
    "attn_window": lambda v: per_layer(None, v["n_layer"]),
}
