"""Every option of a conversion, in one value.

A checkpoint keeps the :class:`Options` it was opened with, so the manifest and the model card's command can record
every choice that shaped the output. :data:`INFO` is the single table of options: the command line and its help, the
card's command, the manifest and the check for inapplicable options are all derived from it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gptconvert.errors import UsageError
from gptconvert.model.option_info import OptionInfo, Stage, option
from reference_model.config import TASKS

Level = Literal["default", "full"]

#: ONNX operator sets that the graphs are written for.
OPSETS = range(17, 22)
#: Quantised ONNX graphs; ``model.encodings.QUANTISED`` defines them.
QUANTISED = ("q8", "q4", "q4:plain")
#: Smaller ONNX graphs: those, and one that computes in float16.
SMALLER = (*QUANTISED, "fp16")
#: Largest safetensors file by default, as in huggingface_hub.
SHARD_BYTES = 5_000_000_000

#: Types of GGUF files, and those of them in which most matrices are quantised.
GGUF_TYPES, GGUF_QUANTISED = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"), ("q8_0", "q5_0", "q4_0")
#: Types of LiteRT files, and those of them in which most matrices are quantised.
TFLITE_TYPES, TFLITE_QUANTISED = ("f32", "f16", "int8"), ("int8",)

_ONNX, _TF, _GGUF, _TFLITE = (frozenset({name}) for name in ("onnx", "tf", "gguf", "tflite"))
_SHARDED = frozenset({"safetensors", "gguf"})


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to open a checkpoint, what to write, and how.

    Paths may be :class:`os.PathLike`, and sizes text such as ``5GB``; both are converted.

    Attributes:
        step: training step, if a directory holds several checkpoints.
        hparams: configuration file to use instead of the one next to the weights.
        weights_file: weights file to read, if a directory holds several.
        adapter: LoRA adapter to merge into the weights: a directory or a hub repository.
        base: base model of the source, which is then an adapter: the same as opening ``base`` with ``adapter``.
        revision: hub branch, tag or commit.
        cache_dir: hub cache directory; None: the hub library's default.
        offline: use the hub cache only.
        task: ``text-generation``, ``feature-extraction``, ``text-classification``, ``token-classification``,
            ``question-answering`` or ``multiple-choice``; None: chosen from the checkpoint's heads.
        scope: the first part of the chosen model's tensor names, if one file holds several models.
        n_head: number of attention heads, for formats that do not record it.
        pad_token_id: token that text classification treats as padding; None: from the configuration.
        activation: GELU formula, ``tanh`` or ``erf``, for formats that do not record it.
        trim_vocab: number of token ids to keep, to remove vocabulary padding.
        ignore_key: keys of the source's configuration to ignore; ``outer.inner`` for a key of a nested object.
        ignore_tensor: patterns of the names of tensors to ignore (``*`` and ``?``).
        set_key: ``KEY=VALUE``, keys to set in the source's configuration before it is read; VALUE is JSON, else text.
        targets: names of the formats to write, as in ``--to``: ``gptconvert formats`` lists them.
        dtype: storage type: ``fp32``, ``fp16`` or ``bf16``; None: each weight as stored.
        opset: ONNX operator set, 17 to 21.
        kv_cache: whether the ONNX graph takes and returns cached keys and values; None: if it is a language model.
        position_ids: whether the ONNX graph takes ``position_ids`` for every task (a language model always does);
            otherwise its positions count slots, padding included.
        single_file: whether ONNX weights are stored inside the graph file; None: those of quantised graphs up to
            512 MiB.
        quantize: smaller ONNX graphs to write: ``q8``, ``q4``, ``q4:plain``, and ``fp16``, which computes in float16.
        no_base: write the quantised graphs only.
        calibrate: text that chooses the 4-bit codes (GPTQ): a UTF-8 file, or ``self`` for text sampled from the
            model; None: each code is the nearest.
        last_token: write a graph beside each that computes the logits of each row's last token only.
        in_place: write a graph beside each that writes keys and values into a buffer of the caller's.
        block_size: elements of a row that share a scale in quantised graphs: 16, 32, 64 or 128.
        accuracy_level: of quantised matrix products: 4 rounds activations to 8 bits, 1 keeps float32, 0 is the
            runtime's choice.
        gguf_type: types of the GGUF files to write, one file each: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q5_0``,
            ``q4_0``; empty: that of ``dtype``, else ``f16``.
        tflite_type: types of the LiteRT files to write, one file each: ``f32``, ``f16``, ``int8``; empty: that of
            ``dtype``, else ``f32``.
        max_shard_size: largest safetensors or GGUF file, in bytes; None: 5 GB for safetensors, any for GGUF.
        xla: whether to add jit-compiled signatures of fixed shape to the SavedModel.
        verify: ``default`` or ``full``; None: skip verification.
        seed: of the probes; any but 0 adds some of random length, batch size, mask and past.
        eval_text: UTF-8 text file that the quality of lossy exports is measured on; None: the language reference of
            Python, and text sampled from the model.
        max_kl: most mean KL divergence of a lossy export from its source, in nats per token; None: 0.01 for 8 bits
            (0.05 in LiteRT), 0.1 for 5, 0.2 for 4.
        force: replace an existing output.
        allow_nonfinite: convert weights that contain NaN or infinities.
        strict: treat notes as errors.

    Raises:
        UsageError: a value is of the wrong type, too small, or not among its field's choices.
    """

    step: int | None = option(
        None,
        "--step",
        "source",
        "Source",
        "Read this training step.",
        metavar="N",
        default_text="latest",
    )
    hparams: str | None = option(
        None,
        "--hparams",
        "source",
        "Checkpoint",
        "Read the configuration from this file.",
        metavar="FILE",
        default_text="the file next to the weights",
        placeholder="HPARAMS",
    )
    weights_file: str | None = option(
        None,
        "--weights-file",
        "source",
        "Source",
        "Read this weights file, if the directory contains several.",
        metavar="NAME",
    )
    adapter: str | None = option(
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
    base: str | None = option(
        None,
        "--base",
        "source",
        "Source",
        "Treat SOURCE as a LoRA adapter, and merge it into this model: a directory or a hub repository.",
        metavar="DIR",
        shapes=False,
    )
    # Not recorded; the resolved commit is recorded instead.
    revision: str | None = option(
        None,
        "--revision",
        "source",
        "Source",
        "Read this hub branch, tag or commit. The resolved commit is recorded.",
        metavar="REVISION",
        default_text="main",
        shapes=False,
    )
    cache_dir: str | None = option(
        None,
        "--cache-dir",
        "source",
        "Source",
        "Cache hub files in this directory.",
        metavar="DIR",
        default_text="the hub library's default",
        shapes=False,
    )
    offline: bool = option(
        False, "--offline", "source", "Source", "Use cached hub files only; never access the network.", shapes=False
    )
    task: str | None = option(
        None,
        "--task",
        "checkpoint",
        "Checkpoint",
        f"Export the model with this head: {', '.join(TASKS)}.",
        metavar="TASK",
        default_text="from the checkpoint",
        choices=TASKS,
    )
    scope: str | None = option(
        None,
        "--scope",
        "checkpoint",
        "Checkpoint",
        "Read the model under this prefix of the tensor names, if the file contains several.",
        metavar="NAME",
    )
    n_head: int | None = option(
        None,
        "--n-head",
        "checkpoint",
        "Checkpoint",
        "Set the number of attention heads, if the checkpoint does not record it.",
        metavar="N",
        minimum=1,
        default_text="width / 64",
    )
    pad_token_id: int | None = option(
        None,
        "--pad-token-id",
        "checkpoint",
        "Checkpoint",
        "Treat this token as padding in text classification.",
        metavar="N",
        default_text="from the checkpoint",
    )
    activation: str | None = option(
        None,
        "--activation",
        "checkpoint",
        "Checkpoint",
        "Set the GELU formula, if the checkpoint does not record it.",
        choices=("tanh", "erf"),
        default_text="erf for nanoGPT and GPT-NeoX in GGUF, else tanh",
    )
    trim_vocab: int | None = option(
        None,
        "--trim-vocab",
        "checkpoint",
        "Checkpoint",
        "Keep only the first N token ids, to remove vocabulary padding.",
        metavar="N",
        minimum=1,
        default_text="all",
    )
    ignore_key: tuple[str, ...] = option(
        (),
        "--ignore-key",
        "checkpoint",
        "Checkpoint",
        "Ignore this key of the source's configuration; repeat for several.",
        metavar="NAME",
    )
    ignore_tensor: tuple[str, ...] = option(
        (),
        "--ignore-tensor",
        "checkpoint",
        "Checkpoint",
        "Ignore tensors whose names match, such as 'v_head.*'; repeat for several.",
        metavar="PATTERN",
    )
    set_key: tuple[str, ...] = option(
        (),
        "--set",
        "checkpoint",
        "Checkpoint",
        "Set a key of the source's configuration before it is read; repeat for several.",
        metavar="KEY=VALUE",
    )
    targets: tuple[str, ...] = option(
        ("onnx",), "--to", "output", "Output", "Write this format; repeat, or separate by commas, for several."
    )
    dtype: str | None = option(
        None,
        "--dtype",
        "output",
        "Output",
        "Store the weights in this type.",
        choices=("fp32", "fp16", "bf16"),
        default_text="as stored",
    )
    opset: int = option(
        OPSETS[-1],
        "--opset",
        "output",
        "ONNX",
        f"Write this ONNX operator set, {OPSETS[0]} to {OPSETS[-1]}.",
        metavar="N",
        targets=_ONNX,
        choices=tuple(OPSETS),
    )
    kv_cache: bool | None = option(
        None,
        "--kv-cache",
        "output",
        "ONNX",
        "Add cached keys and values to the graph's inputs and outputs.",
        default_text="for language models",
        targets=_ONNX,
    )
    position_ids: bool = option(
        False,
        "--position-ids",
        "output",
        "ONNX",
        "Take position_ids as an input, as language models always do; other tasks count padding without it.",
        targets=_ONNX,
    )
    single_file: bool | None = option(
        None,
        "--single-file",
        "output",
        "ONNX",
        "Store the weights inside the graph file (below 2 GiB).",
        default_text="for quantised graphs up to 512 MiB",
        targets=_ONNX,
    )
    quantize: tuple[str, ...] = option(
        (),
        "--quantize",
        "output",
        "ONNX",
        f"Write this smaller graph too: {', '.join(SMALLER)} (which computes in float16); repeat for several.",
        metavar="NAME",
        targets=_ONNX,
        choices=SMALLER,
    )
    no_base: bool = option(False, "--no-base", "output", "ONNX", "Write the quantised graphs only.", targets=_ONNX)
    # A path is not recorded, because it is local.
    calibrate: str | None = option(
        None,
        "--calibrate",
        "output",
        "ONNX",
        "Choose 4-bit codes by their effect on this text (GPTQ): a file, or 'self' for text sampled from the model.",
        metavar="FILE",
        default_text="none: each code is the nearest",
        targets=_ONNX,
        placeholder="TEXT",
        repo=True,
    )
    last_token: bool = option(
        False,
        "--last-token",
        "output",
        "ONNX",
        "Add a graph that computes the logits of the last token only, on the same weights.",
        targets=_ONNX,
    )
    in_place: bool = option(
        False,
        "--in-place",
        "output",
        "ONNX",
        "Add a graph whose keys and values stay in one buffer, on the same weights; onnxruntime only.",
        targets=_ONNX,
    )
    block_size: int = option(
        32,
        "--block-size",
        "output",
        "ONNX",
        "Quantise blocks of 16, 32, 64 or 128 weights with one scale each.",
        metavar="N",
        choices=(16, 32, 64, 128),
        targets=_ONNX,
    )
    accuracy_level: int = option(
        4,
        "--accuracy-level",
        "output",
        "ONNX",
        "Multiply quantised weights at this level: 4 rounds activations to 8 bits, 1 does not, 0 is the runtime's "
        "choice.",
        metavar="N",
        choices=(0, 1, 4),
        targets=_ONNX,
    )
    gguf_type: tuple[str, ...] = option(
        (),
        "--gguf-type",
        "output",
        "GGUF",
        f"Write a GGUF file of this type: {', '.join(GGUF_TYPES)}; repeat for several.",
        metavar="NAME",
        default_text="as --dtype, else f16",
        targets=_GGUF,
        choices=GGUF_TYPES,
    )
    tflite_type: tuple[str, ...] = option(
        (),
        "--tflite-type",
        "output",
        "LiteRT",
        f"Write a LiteRT file of this type: {', '.join(TFLITE_TYPES)}; repeat for several.",
        metavar="NAME",
        default_text="as --dtype, else f32",
        targets=_TFLITE,
        choices=TFLITE_TYPES,
    )
    max_shard_size: int | None = option(
        None,
        "--max-shard-size",
        "output",
        "safetensors and TensorFlow",
        "Split safetensors and GGUF files larger than this, such as 500MB or 2GiB.",
        metavar="SIZE",
        minimum=1,
        default_text="5GB for safetensors, none for GGUF",
        targets=_SHARDED,
    )
    xla: bool = option(
        False,
        "--xla",
        "output",
        "safetensors and TensorFlow",
        "Add jit-compiled signatures of fixed shape to the SavedModel.",
        targets=_TF,
    )
    verify: Literal["default", "full"] | None = option(
        "default",
        "--verify",
        "run",
        "Verification",
        "Verify at this level; full tests every length up to the context length.",
        choices=("default", "full"),
    )
    seed: int = option(
        0,
        "--seed",
        "run",
        "Verification",
        "Draw the probes from this seed, and add some of random length, batch size, padding and past.",
        metavar="N",
        default_text="0, the fixed probes",
        shapes=False,
    )
    eval_text: str | None = option(
        None,
        "--eval-text",
        "run",
        "Verification",
        "Measure the quality of quantised exports on this text.",
        metavar="FILE",
        default_text="Python's language reference and text sampled from the model",
        shapes=False,
        targets=_ONNX | _GGUF | _TFLITE,
    )
    max_kl: float | None = option(
        None,
        "--max-kl",
        "run",
        "Verification",
        "Fail if a quantised export's mean KL divergence from the source, in nats per token, exceeds this.",
        metavar="X",
        default_text="0.01 for 8 bits (0.05 in LiteRT), 0.1 for 5, 0.2 for 4",
        shapes=False,
        targets=_ONNX | _GGUF | _TFLITE,
    )
    force: bool = option(
        False, "--force", "run", "Output", "Replace an existing output once the new one is complete.", shapes=False
    )
    allow_nonfinite: bool = option(
        False, "--allow-nonfinite", "run", "Verification", "Convert weights that contain NaN or infinities."
    )
    strict: bool = option(False, "--strict", "run", "Verification", "Treat notes as errors.", shapes=False)

    def __post_init__(self) -> None:
        for name, info, value in self._entries():
            if value is None and (DEFAULTS[name] is None or name == "verify"):
                continue
            try:
                object.__setattr__(self, name, info.checked(DEFAULTS[name], value))
            except ValueError as error:
                raise UsageError(
                    f"invalid value of {name}", item=info.flag, expected=str(error), found=repr(value)[:80]
                ) from None

    def __repr__(self) -> str:
        """Only what differs from the defaults."""
        return f"Options({', '.join(f'{name}={getattr(self, name)!r}' for name in self.given())})"

    def given(self, *stages: Stage) -> dict[str, OptionInfo]:
        """Fields of these stages (default: all) whose value is not the default, with their metadata."""
        return {
            name: info
            for name, info, value in self._entries()
            if value != DEFAULTS[name] and (not stages or info.stage in stages)
        }

    @property
    def rounds(self) -> bool:
        """Whether an export has quantised weights, whose quality is measured."""
        graphs = "onnx" in self.targets and any(name in QUANTISED for name in self.quantize)
        gguf = "gguf" in self.targets and any(name in GGUF_QUANTISED for name in self.gguf_type)
        return graphs or gguf or ("tflite" in self.targets and any(t in TFLITE_QUANTISED for t in self.tflite_type))

    def check_targets(self, named: Container[str] = ()) -> None:
        """Reject options that none of the targets uses.

        Args:
            named: fields given explicitly, which are rejected even if they repeat the default.

        Raises:
            UsageError: such options are set; the message lists all of them.
        """
        unused = [
            f"{info.words(value)[0]} has no effect without {' or '.join(f'--to {t}' for t in sorted(info.targets))}"
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
            name: os.path.basename(os.path.abspath(value)) if info.is_local(value) else value
            for name, info, value in self._entries()
            if info.shapes and name != "targets"
        }

    def command_words(self) -> list[str]:
        """Command-line words that reproduce these options, including the targets."""
        words = [word for target in sorted(self.targets) for word in ("--to", target)]
        for name, info in self.given().items():
            if info.shapes and name != "targets":
                words += info.words(getattr(self, name))
        return words

    def _entries(self) -> Iterator[tuple[str, OptionInfo, Any]]:
        for name in FIELDS:
            yield name, INFO[name], getattr(self, name)


def as_options(options: object) -> Options:
    """``options``, or the defaults for None.

    Raises:
        UsageError: it is something else, such as a dictionary.
    """
    if options is None:
        return Options()
    if isinstance(options, Options):
        return options
    found = f"{type(options).__name__} {options!r}"[:80]
    raise UsageError("options are of the wrong type", expected="gptconvert.Options(...)", found=found)


INFO: Mapping[str, OptionInfo] = {f.name: f.metadata["info"] for f in dataclasses.fields(Options)}
FIELDS: tuple[str, ...] = tuple(INFO)
DEFAULTS: Mapping[str, Any] = {f.name: f.default for f in dataclasses.fields(Options)}
