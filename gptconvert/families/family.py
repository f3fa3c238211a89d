"""What a family is: tables of the tensor names and the configuration keys of every kind of file it is stored in.

To add a family, write one file, ``gptconvert/families/NAME.py``, and list its ``FAMILY`` in ``registry.py``:

1. ``HF = hf_scheme(Row(canonical, stored, shape, steps), …)``: one row per tensor of the body in Hugging Face's
   files. Heads, prefixes and mask buffers are added. Linear weights become ``[out, in]`` and q, k, v one tensor of
   three blocks; the transforms of ``model/transforms.py`` do both.
2. ``CONFIG = table(*vocabulary_keys(…), *size_keys(…), Key(name, field, kind, default), …)``: one line per key of
   config.json, read and written alike. ``harmless`` names keys that change no output, ``unused`` those that must be
   off, ``writes`` what transformers always saves, ``derived`` computes fields that are mathematics rather than keys.
   Every other key is refused by name.
3. ``FAMILY = Family(…, fixed={…})``: the model types, the class of each task, and the fields of ``GPTConfig`` that
   all models of the family share.
4. Formats of the original trainer: one file each in ``trainers/``, with a ``LAYOUT`` that the family lists.

A family whose block is another's under other names reuses that family's table and ``fixed``. The tests are
parametrised over the registry; ``tests/families/witness.py`` needs a tiny configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gptconvert.errors import UsageError
from gptconvert.families.heads import choose_task, head_config, head_fields
from gptconvert.model.config_table import ConfigTable, Reading
from gptconvert.model.options import Options
from gptconvert.model.schemes import Scheme
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import take_rows
from reference_model.config import GPTConfig


class ReadConfig(NamedTuple):
    """A configuration, the harmless keys to pass on, and what the user should know (one sentence each)."""

    config: GPTConfig
    carried: dict[str, object]
    notes: list[str]


@dataclass(frozen=True)
class ConfigInput:
    """What a configuration is read from.

    Attributes:
        family: whose configuration it is.
        raw: the parsed file; empty if there is none.
        path: the file, for messages.
        tensors: what the files hold, for sizes that no configuration states.
        options: the user's choices.
    """

    family: Family
    raw: Mapping[str, object]
    path: str | None
    tensors: Mapping[str, LazyTensor]
    options: Options

    def config(self, reading: Reading, *, tied: bool = True, **decided: object) -> GPTConfig:
        """The configuration of a trainer's file, which holds a language model or its body.

        Args:
            reading: the values of the file.
            tied: whether the language-model head is the embedding, or is always there.
            decided: values that tensors or options decide.

        Raises:
            InputError: no model can have this configuration.
            UnsupportedError: keys are not implemented, or the task asked for has no head.
        """
        task = choose_task(self.family.heads, {}, self.path, self.tensors, self.options, tied=tied)
        return reading.config(**{**self.family.common, "task": task, **decided})


@dataclass(frozen=True)
class Layout:
    """A kind of file that a trainer writes.

    Attributes:
        scheme: the names and shapes of its tensors.
        read: reads its configuration.
    """

    scheme: Scheme
    read: Callable[[ConfigInput], ReadConfig]


@dataclass(frozen=True)
class Family:
    """One GPT: how its configurations and tensor names translate.

    Attributes:
        name: registry name.
        title: for people.
        model_types: values of config.json's ``model_type``; the first is written.
        heads: task → the architecture that config.json names for it; tasks the family has no head for are absent.
        hf: names in Hugging Face's files.
        keys: keys of config.json.
        trainers: the kinds of file that trainers write.
        fixed: fields of :class:`GPTConfig` that are the same in all models of the family.
        tokenizer: kind of BPE: ``byte-level`` or ``word-end``.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    heads: Mapping[str, str]
    hf: Scheme
    keys: ConfigTable
    trainers: tuple[Layout, ...] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)
    tokenizer: str = "byte-level"

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The name table of each naming scheme; a format with several calls them ``FORMAT:WHICH``."""
        return (self.hf, *(layout.scheme for layout in self.trainers))

    @property
    def common(self) -> dict[str, object]:
        """The fields that all configurations of the family share."""
        return {"family": self.name, **self.fixed}

    def scheme(self, name: str) -> Scheme:
        """The name table of a naming scheme."""
        return next(scheme for scheme in self.schemes if scheme.name == name)

    def reads(self, scheme: str) -> bool:
        """Whether files of this naming scheme can be of this family."""
        return any(known.name == scheme for known in self.schemes)

    def read_config(
        self,
        scheme: str,
        raw: Mapping[str, object],
        path: str | None,
        tensors: Mapping[str, LazyTensor],
        options: Options,
    ) -> ReadConfig:
        """The configuration of files of a naming scheme.

        Raises:
            InputError: it is malformed, or no model can have it.
            UnsupportedError: keys, values or the task are not implemented.
            UsageError: an option is needed, or contradicts the files.
        """
        given = ConfigInput(self, raw, path, tensors, options)
        layout = next((layout for layout in self.trainers if layout.scheme.name == scheme), None)
        return read_config_json(given) if layout is None else layout.read(given)

    def write_config(self, config: GPTConfig, carried: Mapping[str, object]) -> dict[str, object]:
        """config.json, as transformers would save it, with the source's harmless keys."""
        heads = head_config(self.heads, config, carried)
        return {**self.keys.write(config, {**carried, **heads}), "model_type": self.model_types[0]}


def read_config_json(given: ConfigInput) -> ReadConfig:
    """Hugging Face's config.json. Raises: see :meth:`Family.read_config`."""
    family = given.family
    reading = family.keys.read(given.raw, given.path)
    decided, notes = head_fields(family.heads, reading, given.tensors, given.options)
    return ReadConfig(reading.config(**family.common, **decided), reading.carried, notes)


#: Canonical tensors with one row, or entry, per id.
BY_ID = ("wte.weight", "lm_head.weight", "lm_head.bias")


def trim_vocabulary(
    config: GPTConfig, weights: Mapping[str, LazyTensor], size: int
) -> tuple[GPTConfig, dict[str, LazyTensor], list[str]]:
    """The model with the ids from ``size`` on left out, and a note that says so.

    Raises:
        UsageError: there are not so many, or a token that ends or begins texts is among them.
    """
    if not 0 < size <= config.vocab_size:
        raise UsageError(f"--trim-vocab {size}", expected=f"1 to {config.vocab_size}, the model's vocabulary")
    lost = [i for i in (config.bos_token_id, config.eos_token_id, config.pad_token_id) if i is not None and i >= size]
    if lost:
        raise UsageError(
            f"--trim-vocab {size} cuts off the special token {lost[0]}", expected=f"at least {max(lost) + 1}"
        )
    kept = {n: take_rows(w, [(0, size)]) if n in BY_ID else w for n, w in weights.items()}
    note = f"the vocabulary was cut from {config.vocab_size} ids to {size} (--trim-vocab)"
    return dataclasses.replace(config, vocab_size=size), kept, [note] if size < config.vocab_size else []
