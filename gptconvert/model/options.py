"""Every choice a user can make about a conversion, in one value.

An :class:`Options` travels with the checkpoint it opened, so the manifest and the model card's command can name each
choice that shaped the output. :data:`INFO` is the one table of options: the command line and its help, the card's
command, the manifest and the check for options that do not apply all follow it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gptconvert.errors import UsageError
from reference_model.config import TASKS

Level = Literal["default", "full"]
#: When a field takes effect: opening files, understanding the checkpoint, writing targets, or running.
Stage = Literal["source", "checkpoint", "output", "run"]
#: Section of the help that lists the option.
Group = Literal["Source", "Checkpoint", "Output", "ONNX", "safetensors and TensorFlow", "Verification"]
#: What the value of an option is; the command line shows the word and checks the value accordingly.
Metavar = Literal["N", "SIZE", "FILE", "DIR", "NAME", "REVISION", "TASK"]

#: ONNX operator sets that the graphs are written for.
OPSETS = range(17, 22)
#: Largest safetensors file by default, as in huggingface_hub.
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class OptionInfo:
    """What the program knows of one field of :class:`Options`.

    Attributes:
        flag: the command line's spelling.
        stage: when it takes effect.
        group: section of the help.
        help: for the command line, in the imperative.
        metavar: kind of value; None: a flag, or one of ``choices``.
        default_text: the default in words, where None stands for it.
        shapes: whether it changes what is written; the manifest and the card's command name those that do.
        targets: targets that read it; empty: all.
        choices: allowed values; empty: any.
        minimum: smallest allowed number.
        placeholder: written in the card's command in place of a local path.
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


def _option(default: object, flag: str, stage: Stage, group: Group, about: str, **info: Any) -> Any:
    """A field of :class:`Options` with its row of the table."""
    return field(default=default, metadata={"info": OptionInfo(flag, stage, group, about, **info)})


_ONNX, _SAFETENSORS, _TF = frozenset({"onnx"}), frozenset({"safetensors"}), frozenset({"tf"})


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to open a checkpoint, what to write, and how.

    Attributes:
        step: training step, where a directory holds several checkpoints.
        hparams: configuration file to use instead of the one beside the weights.
        weights_file: which weights file to read, where a directory holds several.
        revision: hub branch, tag or commit.
        cache_dir: hub cache directory; None: the hub library's default.
        offline: use the hub cache only.
        task: one of ``reference_model.config.TASKS``; None: what the checkpoint's heads say.
        n_head: number of heads, for formats that do not record it.
        pad_token_id: token that text classification treats as padding; None: the configuration's.
        activation: ``tanh`` or ``erf``, the formula of GELU, for formats that do not record it.
        trim_vocab: number of ids to keep; the rows after them only pad the vocabulary.
        targets: names as in ``--to``.
        dtype: storage type: ``fp32``, ``fp16`` or ``bf16``; None: each weight as stored.
        opset: ONNX operator set.
        kv_cache: whether the ONNX graph takes and returns keys and values.
        single_file: whether ONNX weights are stored inside the graph file.
        max_shard_size: largest safetensors file, in bytes.
        xla: whether the SavedModel also gets jit-compiled signatures of fixed shape.
        verify: ``default`` or ``full``; None: skip verification.
        force: replace an existing output.
        allow_nonfinite: convert weights that contain NaN or infinities.
        strict: treat notes as errors.

    Raises:
        UsageError: a value outside a field's choices.
    """

    step: int | None = _option(
        None,
        "--step",
        "source",
        "Source",
        "Read this training step, if there are several.",
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
        default_text="beside the weights",
        placeholder="HPARAMS",
    )
    weights_file: str | None = _option(
        None,
        "--weights-file",
        "source",
        "Source",
        "Read this weights file, if the directory has several.",
        metavar="NAME",
    )
    # Not recorded itself: the resolved commit is.
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
        "Keep hub files in this directory.",
        metavar="DIR",
        default_text="the hub library's",
        shapes=False,
    )
    offline: bool = _option(
        False, "--offline", "source", "Source", "Use hub files from the cache only; never the network.", shapes=False
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
    n_head: int | None = _option(
        None,
        "--n-head",
        "checkpoint",
        "Checkpoint",
        "Set the number of heads, if the checkpoint does not record it.",
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
        "Set the formula of GELU, if the checkpoint does not record it.",
        choices=("tanh", "erf"),
        default_text="erf for nanoGPT, tanh for Megatron-LM",
    )
    trim_vocab: int | None = _option(
        None,
        "--trim-vocab",
        "checkpoint",
        "Checkpoint",
        "Keep the first N token ids; drop the rows that pad the vocabulary.",
        metavar="N",
        minimum=1,
        default_text="all",
    )
    targets: tuple[str, ...] = _option(
        ("onnx",), "--to", "output", "Output", "Write this format; repeat the option for several."
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
    kv_cache: bool = _option(
        True, "--kv-cache", "output", "ONNX", "Make keys and values inputs and outputs of the graph.", targets=_ONNX
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
        "Split safetensors files above this size, such as 500MB or 2GiB.",
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
        "Verify at this level; full tests all lengths up to the context.",
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
            if info.choices and value is not None and value not in info.choices:
                raise UsageError(
                    f"no such value of {name}",
                    item=info.flag,
                    expected=f"one of {', '.join(map(str, info.choices))}",
                    found=repr(value),
                )

    def given(self, *stages: Stage) -> dict[str, OptionInfo]:
        """Fields of these stages (none named: all) whose value is not the default, with what is known of them."""
        return {
            name: info
            for name, info, value in self._entries()
            if value != DEFAULTS[name] and (not stages or info.stage in stages)
        }

    def check_targets(self, named: Container[str] = ()) -> None:
        """Refuse options that none of the targets reads.

        Args:
            named: fields given explicitly: these are refused even if they repeat the default.

        Raises:
            UsageError: there are some; all are named.
        """
        unused = [
            f"{_words(info, value)[0]} has no effect without {' or '.join(f'--to {t}' for t in sorted(info.targets))}"
            for name, info, value in self._entries()
            if info.targets and not info.targets & {*self.targets} and (name in named or value != DEFAULTS[name])
        ]
        if unused:
            raise UsageError("; ".join(unused), hint="add the target, or drop the option")

    def opened_with(self, opened: Options) -> Options:
        """These options for a checkpoint that is open already: what it was opened with stands.

        Raises:
            UsageError: these say otherwise.
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
        """Every choice that shapes the output, as plain values without paths of this machine."""
        return {
            name: os.path.basename(value) if info.placeholder and isinstance(value, str) else value
            for name, info, value in self._entries()
            if info.shapes and name != "targets"
        }

    def command_words(self) -> list[str]:
        """The command-line words that make the same choices again, targets included."""
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


def _words(info: OptionInfo, value: object) -> list[str]:
    """One choice in words of the command line."""
    if value is False or value is None:  # a default of True, or of a level, switched off
        return [info.flag.replace("--", "--no-", 1)]
    if value is True:
        return [info.flag]
    return [info.flag, info.placeholder or str(value)]
