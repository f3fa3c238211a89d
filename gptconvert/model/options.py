"""Every choice a user can make about a conversion, in one value.

An :class:`Options` travels with the checkpoint it opened, so the manifest and the model card's command can name each
choice that shaped the output. The table below says of each field how the command line spells it, whether it changes
the bytes that are written, and which targets read it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gptconvert.errors import UsageError

Level = Literal["default", "full"]
#: When a field takes effect: opening files, understanding the checkpoint, writing targets, or running.
Stage = Literal["source", "checkpoint", "output", "run"]

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
        shapes: whether it changes what is written; the manifest and the card's command name those that do.
        targets: targets that read it; empty: all.
        choices: allowed values; empty: any.
        placeholder: written in the card's command in place of a local path.
    """

    flag: str
    stage: Stage
    shapes: bool = True
    targets: frozenset[str] = frozenset()
    choices: tuple[object, ...] = ()
    placeholder: str | None = None


def _info(flag: str, stage: Stage, **info: Any) -> Mapping[str, OptionInfo]:
    return {"info": OptionInfo(flag, stage, **info)}


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

    step: int | None = field(default=None, metadata=_info("--step", "source"))
    hparams: str | None = field(default=None, metadata=_info("--hparams", "source", placeholder="HPARAMS"))
    weights_file: str | None = field(default=None, metadata=_info("--weights-file", "source"))
    revision: str | None = field(
        default=None, metadata=_info("--revision", "source", shapes=False)
    )  # the resolved commit is recorded
    cache_dir: str | None = field(default=None, metadata=_info("--cache-dir", "source", shapes=False))
    offline: bool = field(default=False, metadata=_info("--offline", "source", shapes=False))
    task: str | None = field(default=None, metadata=_info("--task", "checkpoint"))
    n_head: int | None = field(default=None, metadata=_info("--n-head", "checkpoint"))
    pad_token_id: int | None = field(default=None, metadata=_info("--pad-token-id", "checkpoint"))
    activation: str | None = field(
        default=None, metadata=_info("--activation", "checkpoint", choices=("tanh", "erf"))
    )
    trim_vocab: int | None = field(default=None, metadata=_info("--trim-vocab", "checkpoint"))
    targets: tuple[str, ...] = field(default=("onnx",), metadata=_info("--to", "output"))
    dtype: str | None = field(default=None, metadata=_info("--dtype", "output", choices=("fp32", "fp16", "bf16")))
    opset: int = field(
        default=OPSETS[-1], metadata=_info("--opset", "output", targets=frozenset({"onnx"}), choices=tuple(OPSETS))
    )
    kv_cache: bool = field(default=True, metadata=_info("--kv-cache", "output", targets=frozenset({"onnx"})))
    single_file: bool = field(default=False, metadata=_info("--single-file", "output", targets=frozenset({"onnx"})))
    max_shard_size: int = field(
        default=SHARD_BYTES, metadata=_info("--max-shard-size", "output", targets=frozenset({"safetensors"}))
    )
    xla: bool = field(default=False, metadata=_info("--xla", "output", targets=frozenset({"tf"})))
    verify: Level | None = field(default="default", metadata=_info("--verify", "run", choices=("default", "full")))
    force: bool = field(default=False, metadata=_info("--force", "run", shapes=False))
    allow_nonfinite: bool = field(default=False, metadata=_info("--allow-nonfinite", "run"))
    strict: bool = field(default=False, metadata=_info("--strict", "run", shapes=False))

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

    def check_targets(self) -> None:
        """Refuse options that none of the targets reads.

        Raises:
            UsageError: there are some; all are named.
        """
        unused = [
            info for info in self.given("output").values() if info.targets and not info.targets & {*self.targets}
        ]
        if unused:
            flags = ", ".join(_spelled(info, self) for info in unused)
            needed = " or ".join(f"--to {target}" for info in unused for target in sorted(info.targets))
            raise UsageError(f"{flags} has no effect without {needed}", hint="add the target, or drop the option")

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


INFO: Mapping[str, OptionInfo] = {field.name: field.metadata["info"] for field in dataclasses.fields(Options)}
FIELDS: tuple[str, ...] = tuple(INFO)
DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in dataclasses.fields(Options)}


def _spelled(info: OptionInfo, options: Options) -> str:
    """The flag as the user must have given it."""
    value = next(getattr(options, name) for name, known in INFO.items() if known is info)
    return _words(info, value)[0]


def _words(info: OptionInfo, value: object) -> list[str]:
    """One choice in words of the command line."""
    if value is False or value is None:  # a default of True, or of a level, switched off
        return [info.flag.replace("--", "--no-", 1)]
    if value is True:
        return [info.flag]
    return [info.flag, info.placeholder or str(value)]
