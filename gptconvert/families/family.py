"""A GPT family: tables of tensor names and configuration keys for every file format that stores it.

To add a family, write one file, ``gptconvert/families/NAME.py``, and list its ``FAMILY`` in ``registry.py``:

1. ``HF = hf_scheme(Row(canonical, stored, shape, steps), …)``: one row per body tensor in Hugging Face's
   files; ``hf_scheme`` adds heads, prefixes and mask buffers. The transforms of ``model/transforms.py`` turn linear
   weights into ``[out, in]`` and q, k, v into one tensor of three blocks.
2. ``CONFIG = keys.table(*keys.vocabulary(…), Key(name, field, kind, default), …)``: one line per key of
   config.json, used for reading and writing. ``harmless`` lists keys that do not affect the output, ``unused`` keys
   that must be off, ``writes`` keys that transformers always saves; ``derived`` computes fields from other values.
   Every other key is rejected by name. ``precedence.py`` decides between keys with one meaning.
3. ``FAMILY = Family(…, fixed={…})``: the model types, the architecture for each task, and the fields of
   ``GPTConfig`` that are the same for all models of the family.
4. For each format of the original trainer, add a file to ``trainers/`` whose ``LAYOUT`` the family lists.

A family that only renames another family's block reuses its rows and ``fixed``. The tests are parametrised over the
registry; add a tiny configuration to ``tests/families/witness.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gptconvert.errors import UsageError, short_repr
from gptconvert.families import rope
from gptconvert.families.heads import choose_task, head_config, head_fields
from gptconvert.families.precedence import Agrees, Rule, without_default_scaling
from gptconvert.model.config_table import ConfigTable, Reading
from gptconvert.model.options import Options
from gptconvert.model.schemes import Scheme
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import take_rows
from reference_model.config import GPTConfig


class ReadConfig(NamedTuple):
    """A configuration, the harmless keys and special ids to carry over, and notes (one sentence each)."""

    config: GPTConfig
    carried: dict[str, object]
    notes: list[str]


@dataclass(frozen=True)
class ConfigInput:
    """The inputs from which a configuration is read.

    Attributes:
        family: the model's family.
        raw: the parsed file; empty if there is none.
        path: the file, used in error messages.
        tensors: the tensors in the files; their shapes supply sizes missing from the configuration.
        options: the user's choices.
    """

    family: Family
    raw: Mapping[str, object]
    path: str | None
    tensors: Mapping[str, LazyTensor]
    options: Options

    def config(self, reading: Reading, *, tied: bool = True, **decided: object) -> GPTConfig:
        """The configuration of a trainer's checkpoint, which holds a language model or only its body.

        Args:
            reading: the values of the file.
            tied: whether the language-model head needs no tensor of its own, or is always present.
            decided: values taken from tensors or options.

        Raises:
            InputError: the configuration is invalid.
            UnsupportedError: keys are not implemented, or the requested task has no head.
        """
        task = choose_task(self.family.heads, {}, self.path, self.tensors, self.options, tied=tied)
        return reading.config(**{**self.family.common, "task": task, **decided})

    def read(
        self, reading: Reading, notes: Sequence[str] = (), *, tied: bool = True, **decided: object
    ) -> ReadConfig:
        """:meth:`config` with its special ids and ``notes``."""
        config = self.config(reading, tied=tied, **decided)
        return ReadConfig(config, reading.special_ids(config), [*notes])


@dataclass(frozen=True)
class Layout:
    """A checkpoint format that a trainer writes.

    Attributes:
        scheme: its name table.
        read: reads its configuration.
    """

    scheme: Scheme
    read: Callable[[ConfigInput], ReadConfig]


@dataclass(frozen=True)
class Family:
    """One GPT family: its configuration keys and tensor names.

    Attributes:
        name: registry name.
        title: display name.
        model_types: values of config.json's ``model_type``; the first is written.
        heads: task → its architecture in config.json; tasks without a head in this family are absent.
        hf: name table of Hugging Face's files.
        keys: keys of config.json.
        trainers: the formats that trainers write.
        precedence: which of several keys of config.json with one meaning is read.
        unread: keys that transformers does not read, and whether a value agrees with the configuration.
        fixed: fields of :class:`GPTConfig` that are the same for all models of the family.
        tokenizer: kind of BPE: ``byte-level`` or ``word-end``.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    heads: Mapping[str, str]
    hf: Scheme
    keys: ConfigTable
    trainers: tuple[Layout, ...] = ()
    precedence: Rule = without_default_scaling
    unread: Mapping[str, Agrees] = field(default_factory=dict)
    fixed: Mapping[str, object] = field(default_factory=dict)
    tokenizer: str = "byte-level"

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The name table of each naming scheme; a format with several names them ``FORMAT:VARIANT``."""
        return (self.hf, *(layout.scheme for layout in self.trainers))

    @property
    def common(self) -> dict[str, object]:
        """The fields that are the same in all configurations of the family."""
        return {"family": self.name, **self.fixed}

    def scheme(self, name: str) -> Scheme:
        """The name table of a naming scheme."""
        return next(scheme for scheme in self.schemes if scheme.name == name)

    def reads(self, scheme: str) -> bool:
        """Whether the family has a name table for this naming scheme."""
        return any(known.name == scheme for known in self.schemes)

    def read_config(
        self,
        scheme: str,
        raw: Mapping[str, object],
        path: str | None,
        tensors: Mapping[str, LazyTensor],
        options: Options,
    ) -> ReadConfig:
        """The configuration of files with this naming scheme.

        Raises:
            InputError: it is malformed or invalid.
            UnsupportedError: keys, values or the task are not implemented.
            UsageError: an option is required, or contradicts the files.
        """
        given = ConfigInput(self, raw, path, tensors, options)
        layout = next((layout for layout in self.trainers if layout.scheme.name == scheme), None)
        return read_config_json(given) if layout is None else layout.read(given)

    def read_keys(
        self, raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor]
    ) -> tuple[Reading, dict[str, object], list[str]]:
        """The keys of config.json that transformers reads, the values of those that it does not, and notes.

        Raises:
            InputError, UnsupportedError: as :meth:`ConfigTable.read`.
        """
        chosen, notes = self.precedence(raw, tensors)
        unread = {key: chosen.pop(key) for key in self.unread if key in chosen}
        return self.keys.read(chosen, path), unread, notes

    def write_config(self, config: GPTConfig, carried: Mapping[str, object]) -> dict[str, object]:
        """config.json, as transformers would save it, with the source's harmless keys carried over."""
        heads = head_config(self.heads, config, carried)
        return {**self.keys.write(config, {**carried, **heads}), "model_type": self.model_types[0]}


def read_config_json(given: ConfigInput) -> ReadConfig:
    """Hugging Face's config.json. Raises: see :meth:`Family.read_config`."""
    family = given.family
    reading, unread, notes = family.read_keys(given.raw, given.path, given.tensors)
    bias = bool(family.fixed.get("head_bias", False))
    decided, more = head_fields(family.heads, reading, given.tensors, given.options, head_bias=bias)
    config = reading.config(**family.common, **decided)
    for key, value in sorted(unread.items()):
        if value is not None and not family.unread[key](config, value):
            name = family.title.partition(",")[0]
            notes.append(f"{key} = {short_repr(value)} is ignored: transformers' {name} does not read it")
    carried = {**reading.carried, **reading.special_ids(config)}
    return ReadConfig(config, carried, [*notes, *more, *rope.notes(reading.values, config)])


#: Canonical tensors with one row, or element, per token id.
BY_ID = ("wte.weight", "lm_head.weight", "lm_head.bias")


def trim_vocabulary(
    config: GPTConfig, weights: Mapping[str, LazyTensor], size: int, special: Iterable[int] = ()
) -> tuple[GPTConfig, dict[str, LazyTensor], list[str]]:
    """The model cut to the first ``size`` token ids, and a note for the user.

    Args:
        config: of the whole model.
        weights: of the whole model.
        size: number of ids to keep.
        special: ids that must be kept if the model has them.

    Raises:
        UsageError: the vocabulary is smaller, or the cut would remove a special token.
    """
    if not 0 < size <= config.vocab_size:
        raise UsageError(f"--trim-vocab {size}", expected=f"1 to {config.vocab_size}, the model's vocabulary")
    lost = [token for token in special if size <= token < config.vocab_size]
    if lost:
        raise UsageError(
            f"--trim-vocab {size} removes the special token {lost[0]}", expected=f"at least {max(lost) + 1}"
        )
    kept = {n: take_rows(w, [(0, size)]) if n in BY_ID else w for n, w in weights.items()}
    note = f"the vocabulary was cut from {config.vocab_size} ids to {size} (--trim-vocab)"
    return dataclasses.replace(config, vocab_size=size), kept, [note] if size < config.vocab_size else []
