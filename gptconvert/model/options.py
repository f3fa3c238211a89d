"""Every option of a conversion, in one value.

A checkpoint keeps the :class:`Options` it was opened with, so the manifest and the model card's command can record
every choice that shaped the output. :data:`INFO` is the single table of options: the command line and its help, the
card's command, the manifest and the check for inapplicable options are all derived from it.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gptconvert.errors import UsageError
from reference_model.config import TASKS

Level = Literal["default", "full"]
#: When a field takes effect: opening files, reading the checkpoint, writing targets, or during the run.
Stage = Literal["source", "checkpoint", "output", "run"]
#: Section of the help text.
Group = Literal["Source", "Checkpoint", "Output", "ONNX", "safetensors and TensorFlow", "Verification"]
#: Kind of value of an option; the command line shows this word and checks the value accordingly.
Metavar = Literal["N", "SIZE", "FILE", "DIR", "NAME", "REVISION", "TASK", "PATTERN", "KEY=VALUE"]

#: ONNX operator sets that the graphs are written for.
OPSETS = range(17, 22)
#: Largest safetensors file by default, as in huggingface_hub.
SHARD_BYTES = 5_000_000_000


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


def _option(default: object, flag: str, stage: Stage, group: Group, about: str, **info: Any) -> Any:
    """A field of :class:`Options` with its :class:`OptionInfo`."""
    return field(default=default, metadata={"info": OptionInfo(flag, stage, group, about, **info)})


_ONNX, _SAFETENSORS, _TF = frozenset({"onnx"}), frozenset({"safetensors"}), frozenset({"tf"})


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to open a checkpoint, what to write, and how.

    Attributes:
        step: training step, if a directory holds several checkpoints.
        hparams: configuration file to use instead of the one next to the weights.
        weights_file: weights file to read, if a directory holds several.
        adapter: LoRA adapter to merge into the weights: a directory or a hub repository.
        base: base model of the source, which is then an adapter: the same as opening ``base`` with ``adapter``.
        revision: hub branch, tag or commit.
        cache_dir: hub cache directory; None: the hub library's default.
        offline: use the hub cache only.
        task: one of ``reference_model.config.TASKS``; None: chosen from the checkpoint's heads.
        scope: the first part of the chosen model's tensor names, if one file holds several models.
        n_head: number of attention heads, for formats that do not record it.
        pad_token_id: token that text classification treats as padding; None: from the configuration.
        activation: GELU formula, ``tanh`` or ``erf``, for formats that do not record it.
        trim_vocab: number of token ids to keep, to remove vocabulary padding.
        ignore_key: keys of the source's configuration to ignore; ``outer.inner`` for a key of a nested object.
        ignore_tensor: patterns of the names of tensors to ignore (``*`` and ``?``).
        set_key: ``KEY=VALUE``, keys to set in the source's configuration before it is read; VALUE is JSON, else text.
        targets: names of the formats to write, as in ``--to``.
        dtype: storage type: ``fp32``, ``fp16`` or ``bf16``; None: each weight as stored.
        opset: ONNX operator set.
        kv_cache: whether the ONNX graph takes and returns cached keys and values; None: if it is a language model.
        position_ids: whether the ONNX graph takes ``position_ids``, whatever its task (a language model always does);
            else its positions count slots, padding included.
        single_file: whether ONNX weights are stored inside the graph file.
        max_shard_size: largest safetensors file, in bytes.
        xla: whether to add jit-compiled signatures of fixed shape to the SavedModel.
        verify: ``default`` or ``full``; None: skip verification.
        force: replace an existing output.
        allow_nonfinite: convert weights that contain NaN or infinities.
        strict: treat notes as errors.

    Paths may be :class:`os.PathLike`, and sizes text such as ``5GB``; both are converted.

    Raises:
        UsageError: a value is of the wrong type, too small, or not among its field's choices.
    """

    step: int | None = _option(
        None,
        "--step",
        "source",
        "Source",
        "Read this training step.",
        metavar="N",
        default_text="latest",
    )
    hparams: str | None = _option(
        None,
        "--hparams",
        "source",
        "Checkpoint",
        "Read the configuration from this file.",
        metavar="FILE",
        default_text="the file next to the weights",
        placeholder="HPARAMS",
    )
    weights_file: str | None = _option(
        None,
        "--weights-file",
        "source",
        "Source",
        "Read this weights file, if the directory contains several.",
        metavar="NAME",
    )
    adapter: str | None = _option(
        None,
        "--adapter",
        "source",
        "Source",
        "Merge this LoRA adapter (PEFT): a directory, which may be SOURCE itself, or a hub repository.",
        metavar="DIR",
        placeholder="ADAPTER",
        repo=True,
    )
    # Not recorded: the base becomes the source, and the source the adapter.
    base: str | None = _option(
        None,
        "--base",
        "source",
        "Source",
        "Treat SOURCE as a LoRA adapter, and merge it into this model: a directory or a hub repository.",
        metavar="DIR",
        shapes=False,
    )
    # Not recorded; the resolved commit is recorded instead.
    revision: str | None = _option(
        None,
        "--revision",
        "source",
        "Source",
        "Read this hub branch, tag or commit. The resolved commit is recorded.",
        metavar="REVISION",
        default_text="main",
        shapes=False,
    )
    cache_dir: str | None = _option(
        None,
        "--cache-dir",
        "source",
        "Source",
        "Cache hub files in this directory.",
        metavar="DIR",
        default_text="the hub library's default",
        shapes=False,
    )
    offline: bool = _option(
        False, "--offline", "source", "Source", "Use cached hub files only; never access the network.", shapes=False
    )
    task: str | None = _option(
        None,
        "--task",
        "checkpoint",
        "Checkpoint",
        f"Export the model with this head: {', '.join(TASKS)}.",
        metavar="TASK",
        default_text="from the checkpoint",
        choices=TASKS,
    )
    scope: str | None = _option(
        None,
        "--scope",
        "checkpoint",
        "Checkpoint",
        "Read the model under this prefix of the tensor names, if the file contains several.",
        metavar="NAME",
    )
    n_head: int | None = _option(
        None,
        "--n-head",
        "checkpoint",
        "Checkpoint",
        "Set the number of attention heads, if the checkpoint does not record it.",
        metavar="N",
        minimum=1,
        default_text="width / 64",
    )
    pad_token_id: int | None = _option(
        None,
        "--pad-token-id",
        "checkpoint",
        "Checkpoint",
        "Treat this token as padding in text classification.",
        metavar="N",
        default_text="from the checkpoint",
    )
    activation: str | None = _option(
        None,
        "--activation",
        "checkpoint",
        "Checkpoint",
        "Set the GELU formula, if the checkpoint does not record it.",
        choices=("tanh", "erf"),
        default_text="erf for nanoGPT, tanh for Megatron-LM",
    )
    trim_vocab: int | None = _option(
        None,
        "--trim-vocab",
        "checkpoint",
        "Checkpoint",
        "Keep only the first N token ids, to remove vocabulary padding.",
        metavar="N",
        minimum=1,
        default_text="all",
    )
    ignore_key: tuple[str, ...] = _option(
        (),
        "--ignore-key",
        "checkpoint",
        "Checkpoint",
        "Ignore this key of the source's configuration; repeat for several.",
        metavar="NAME",
    )
    ignore_tensor: tuple[str, ...] = _option(
        (),
        "--ignore-tensor",
        "checkpoint",
        "Checkpoint",
        "Ignore tensors whose names match, such as 'v_head.*'; repeat for several.",
        metavar="PATTERN",
    )
    set_key: tuple[str, ...] = _option(
        (),
        "--set",
        "checkpoint",
        "Checkpoint",
        "Set a key of the source's configuration before it is read; repeat for several.",
        metavar="KEY=VALUE",
    )
    targets: tuple[str, ...] = _option(
        ("onnx",), "--to", "output", "Output", "Write this format; repeat, or separate by commas, for several."
    )
    dtype: str | None = _option(
        None,
        "--dtype",
        "output",
        "Output",
        "Store the weights in this type.",
        choices=("fp32", "fp16", "bf16"),
        default_text="as stored",
    )
    opset: int = _option(
        OPSETS[-1],
        "--opset",
        "output",
        "ONNX",
        f"Write this ONNX operator set, {OPSETS[0]} to {OPSETS[-1]}.",
        metavar="N",
        targets=_ONNX,
        choices=tuple(OPSETS),
    )
    kv_cache: bool | None = _option(
        None,
        "--kv-cache",
        "output",
        "ONNX",
        "Add cached keys and values to the graph's inputs and outputs.",
        default_text="for language models",
        targets=_ONNX,
    )
    position_ids: bool = _option(
        False,
        "--position-ids",
        "output",
        "ONNX",
        "Take position_ids as an input, as language models do; otherwise other tasks count padding too.",
        targets=_ONNX,
    )
    single_file: bool = _option(
        False,
        "--single-file",
        "output",
        "ONNX",
        "Store the weights inside the graph file (below 2 GiB).",
        targets=_ONNX,
    )
    max_shard_size: int = _option(
        SHARD_BYTES,
        "--max-shard-size",
        "output",
        "safetensors and TensorFlow",
        "Split safetensors files larger than this, such as 500MB or 2GiB.",
        metavar="SIZE",
        minimum=1,
        default_text="5GB",
        targets=_SAFETENSORS,
    )
    xla: bool = _option(
        False,
        "--xla",
        "output",
        "safetensors and TensorFlow",
        "Add jit-compiled signatures of fixed shape to the SavedModel.",
        targets=_TF,
    )
    verify: Literal["default", "full"] | None = _option(
        "default",
        "--verify",
        "run",
        "Verification",
        "Verify at this level; full tests every length up to the context length.",
        choices=("default", "full"),
    )
    force: bool = _option(
        False, "--force", "run", "Output", "Replace an existing output once the new one is complete.", shapes=False
    )
    allow_nonfinite: bool = _option(
        False, "--allow-nonfinite", "run", "Verification", "Convert weights that contain NaN or infinities."
    )
    strict: bool = _option(False, "--strict", "run", "Verification", "Treat notes as errors.", shapes=False)

    def __post_init__(self) -> None:
        for name, info, value in self._entries():
            if value is None and (DEFAULTS[name] is None or name == "verify"):
                continue
            try:
                object.__setattr__(self, name, _checked(info, DEFAULTS[name], value))
            except ValueError as error:
                raise UsageError(
                    f"invalid value of {name}", item=info.flag, expected=str(error), found=repr(value)[:80]
                ) from None

    def given(self, *stages: Stage) -> dict[str, OptionInfo]:
        """Fields of these stages (default: all) whose value is not the default, with their metadata."""
        return {
            name: info
            for name, info, value in self._entries()
            if value != DEFAULTS[name] and (not stages or info.stage in stages)
        }

    def check_targets(self, named: Container[str] = ()) -> None:
        """Reject options that none of the targets uses.

        Args:
            named: fields given explicitly, which are rejected even if they repeat the default.

        Raises:
            UsageError: such options are set; the message lists all of them.
        """
        unused = [
            f"{_words(info, value)[0]} has no effect without {' or '.join(f'--to {t}' for t in sorted(info.targets))}"
            for name, info, value in self._entries()
            if info.targets and not info.targets & {*self.targets} and (name in named or value != DEFAULTS[name])
        ]
        if unused:
            raise UsageError("; ".join(unused), hint="add the target, or drop the option")

    def opened_with(self, opened: Options) -> Options:
        """These options with the source and checkpoint options of an open checkpoint.

        Raises:
            UsageError: these options contradict those of the open checkpoint.
        """
        before = {name: getattr(opened, name) for name in FIELDS if INFO[name].stage in ("source", "checkpoint")}
        clash = [name for name in self.given("source", "checkpoint") if getattr(self, name) != before[name]]
        if clash:
            raise UsageError(
                f"{', '.join(clash)} must be given when the checkpoint is opened",
                expected=", ".join(repr(before[name]) for name in clash),
                found=", ".join(repr(getattr(self, name)) for name in clash),
            )
        return dataclasses.replace(self, **before)

    def recorded(self) -> dict[str, object]:
        """Every option that shapes the output, as plain values without local paths."""
        return {
            name: os.path.basename(os.path.abspath(value)) if _is_local(info, value) else value
            for name, info, value in self._entries()
            if info.shapes and name != "targets"
        }

    def command_words(self) -> list[str]:
        """Command-line words that reproduce these options, including the targets."""
        words = [word for target in sorted(self.targets) for word in ("--to", target)]
        for name, info in self.given().items():
            if info.shapes and name != "targets":
                words += _words(info, getattr(self, name))
        return words

    def _entries(self) -> Iterator[tuple[str, OptionInfo, Any]]:
        for name in FIELDS:
            yield name, INFO[name], getattr(self, name)


INFO: Mapping[str, OptionInfo] = {f.name: f.metadata["info"] for f in dataclasses.fields(Options)}
FIELDS: tuple[str, ...] = tuple(INFO)
DEFAULTS: Mapping[str, Any] = {f.name: f.default for f in dataclasses.fields(Options)}


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


def _checked(info: OptionInfo, default: object, value: Any) -> Any:
    """The value of an option, in its field's type.

    Raises:
        ValueError: it is invalid; the message describes valid values.
    """
    if info.metavar == "SIZE" and isinstance(value, str):
        return parse_size(value)
    if info.metavar in ("FILE", "DIR") and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if info.choices:
        if value not in info.choices:
            raise ValueError(f"one of {', '.join(map(str, info.choices))}")
        return value
    kind = bool if info.is_flag else int if info.metavar in ("N", "SIZE") else str
    if isinstance(default, tuple):
        if not isinstance(value, tuple | list) or not all(isinstance(each, str) and each for each in value):
            raise ValueError("a tuple of text")
        if info.metavar == "KEY=VALUE" and not all(each.partition("=")[0] and "=" in each for each in value):
            raise ValueError("KEY=VALUE, such as n_head=12")
        return tuple(value)
    if kind is int and hasattr(value, "__index__") and not isinstance(value, bool):
        value = operator.index(value)  # NumPy's integers too
    if type(value) is not kind:
        raise ValueError({bool: "True or False", int: "a whole number", str: "text"}[kind])
    if isinstance(value, int) and value < info.minimum:
        raise ValueError(f"at least {info.minimum}")
    return value


def _is_local(info: OptionInfo, value: object) -> bool:
    """Whether a value is a local path, which the output does not record."""
    return info.placeholder is not None and isinstance(value, str) and (not info.repo or os.path.exists(value))


def _words(info: OptionInfo, value: object) -> list[str]:
    """Command-line words for one option."""
    if value is False or value is None:  # switches off a default
        return [info.flag.replace("--", "--no-", 1)]
    if value is True:
        return [info.flag]
    if isinstance(value, tuple):
        return [word for each in value for word in (info.flag, str(each))]
    return [info.flag, str(info.placeholder if _is_local(info, value) else value)]
