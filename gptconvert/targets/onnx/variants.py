"""Which graphs the options ask for, with which weights; options that conflict or have no effect are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gptconvert.errors import UnsupportedError, UsageError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.encodings import QUANTISED, Calibrator, cast_to, quantised, stored_tensors
from gptconvert.model.options import INFO, Options
from gptconvert.targets.lossy import OF_VERIFICATION, check_verified
from gptconvert.targets.package.tokenizer import tokenizer_files
from gptconvert.targets.package.tokenizer_process import text_encoder
from reference_model.config import CACHED_TASKS, INPUTS, GPTConfig

#: Up to this many bytes, the weights of a quantised model are stored inside the graph: one file to download.
ALONE_BYTES = 512 << 20
#: Graphs that differ from another only in nodes, by the field of the options that asks for them.
KINDS = ("last_token", "in_place")
#: onnxruntime's GroupQueryAttention requires head sizes that are a multiple of this.
HEAD_MULTIPLE = 8
#: The graph that computes in float16, among those of ``--quantize``.
HALF = "fp16"
#: Keys of the metadata of a quantised graph.
QUANTIZE_KEY, BLOCK_KEY = "gptconvert.quantize", "gptconvert.block_size"
CALIBRATED_KEY = "gptconvert.calibrated"
#: Fields of the options that only graphs of quantised weights use.
OF_QUANTISED = ("block_size", "accuracy_level", *OF_VERIFICATION)


@dataclass(frozen=True)
class Graph:
    """One graph file to write.

    Attributes:
        variant: suffix of its name, which is transformers.js's; empty for the base.
        checkpoint: with its weights as stored.
        single: whether the weights are stored inside the graph file.
        metadata: recorded in the file: how the weights are quantised.
        half: computes in float16.
        kind: suffix of a graph that shares the weights of another: ``last_token``, ``in_place``; empty otherwise.
    """

    variant: str
    checkpoint: Checkpoint
    single: bool
    metadata: Mapping[str, str] = field(default_factory=dict)
    half: bool = False
    kind: str = ""

    @property
    def path(self) -> str:
        """Relative to the output directory."""
        return "_".join(filter(None, ("onnx/model", self.variant, self.kind))) + ".onnx"


def graphs_of(checkpoint: Checkpoint, options: Options) -> list[Graph]:
    """The graphs to write: the base, unless ``no_base``, and the quantised ones.

    Raises:
        UsageError: no graph is left; two have the same name; or an option has no effect.
    """
    kinds = [kind for kind in KINDS if getattr(options, kind)]
    _check_kinds(checkpoint.config, kinds, options)
    _check_used(options)
    base = cast_to(checkpoint, options.dtype)
    graphs = [] if options.no_base else [Graph(variant_of(options), base, bool(options.single_file))]
    calibrator = _calibrator(checkpoint, options)
    for name in dict.fromkeys(options.quantize):
        if name == HALF:
            graphs.append(Graph(HALF, cast_to(checkpoint, HALF), bool(options.single_file), half=True))
            continue
        stored = quantised(checkpoint, QUANTISED[name], options.block_size, calibrator)
        single = options.single_file
        if single is None:  # graphs that share weights need them in a file of their own
            single = not kinds and sum(part.nbytes for part in stored_tensors(stored)) <= ALONE_BYTES
        metadata = {QUANTIZE_KEY: name, BLOCK_KEY: str(options.block_size)}
        if calibrator is not None and QUANTISED[name].bits < 8:
            metadata[CALIBRATED_KEY] = "self" if options.calibrate == "self" else "text"
        graphs.append(Graph(QUANTISED[name].variant, stored, single, metadata))
    _check_graphs(graphs, options)
    return [
        replace(graph, kind=kind)
        for graph in graphs
        for kind in ("", *kinds)
        if not (graph.half and kind == "in_place")
    ]


def _calibrator(checkpoint: Checkpoint, options: Options) -> Calibrator | None:
    """What chooses the 4-bit codes; None if each is the nearest. Reads the text but no weight.

    Raises:
        UsageError: no 4-bit graph is written, or the task or checkpoint does not fit the text.
        InputError: the text cannot be read.
    """
    if options.calibrate is None:
        return None
    if not any(name in QUANTISED and QUANTISED[name].bits < 8 for name in options.quantize):
        raise UsageError("--calibrate has no effect without --quantize q4", hint="add it, or drop the option")
    from gptconvert.targets.onnx.calibration import Calibration
    from gptconvert.verify.evaluation import Amount, Evaluation
    from gptconvert.verify.text import read_text

    if options.calibrate == "self":
        if checkpoint.config.task != "text-generation":
            raise UsageError(
                f"--calibrate self needs a language model, not {checkpoint.config.task}", hint="pass a text file"
            )
        evaluation = Evaluation(checkpoint, None, amount=Amount(16, 256, sampled_rows=64, sampled_tokens=64))
    else:
        encode, text = text_encoder(tokenizer_files(checkpoint)[0]), read_text(options.calibrate)
        evaluation = Evaluation(checkpoint, encode, text, options.calibrate, amount=Amount(16, 256, 0, 0))
    return Calibration(checkpoint, evaluation)


def _check_kinds(config: GPTConfig, kinds: Sequence[str], options: Options) -> None:
    """Refuse graphs that need another task, a cache or a data file."""
    for kind in kinds:
        flag = INFO[kind].flag
        if config.task != "text-generation":
            raise UsageError(f"{flag} has no effect for {config.task}", expected=f"{flag} with text-generation")
        if kind == "in_place" and not has_cache(config, options):
            raise UsageError(f"{flag} contradicts --no-kv-cache", hint="drop one of the options")
        if kind == "in_place" and config.head_dim % HEAD_MULTIPLE:
            raise UnsupportedError(
                "onnxruntime's attention in place cannot run this model",
                item=flag,
                expected=f"a head size that is a multiple of {HEAD_MULTIPLE}",
                found=str(config.head_dim),
                hint="drop the option; the other graphs have no such limit",
            )
        if options.single_file:
            raise UsageError(
                f"{flag} contradicts --single-file: its graph shares the weights of another", hint="drop one of them"
            )


def _check_used(options: Options) -> None:
    """Refuse options that need a quantised graph, or verification, without it."""
    given = options.given()
    graphs = any(name in QUANTISED for name in options.quantize)
    used = graphs or options.rounds
    unused = [
        INFO[name].flag
        for name in OF_QUANTISED
        if name in given and not (used if name in OF_VERIFICATION else graphs)
    ]
    if unused:
        raise UsageError(
            f"{' and '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect without a quantised graph",
            hint="add --quantize q8 or q4, or drop the option",
        )
    check_verified(options)


def _check_graphs(graphs: Sequence[Graph], options: Options) -> None:
    if not graphs:
        raise UsageError("--no-base leaves no graph to write", hint="add --quantize q8 or q4, or drop --no-base")
    names = [graph.variant for graph in graphs]
    if len(set(names)) < len(names):
        raise UsageError(
            "two graphs would have the same name",
            item="--quantize",
            expected="one of q4 and q4:plain",
            found=", ".join(options.quantize),
        )
    if options.allow_nonfinite and options.quantize:
        raise UsageError("--allow-nonfinite has no meaning for quantised weights", hint="drop one of the options")


def variant_of(options: Options) -> str:
    """The requested storage type; empty for the base type."""
    return "" if options.dtype in (None, "fp32") else options.dtype


def has_cache(config: GPTConfig, options: Options) -> bool:
    """Whether the graph takes and returns keys and values: by default, only a language model's.

    Raises:
        UsageError: a cache is requested for a task that runs once over the whole text.
    """
    if options.kv_cache and config.task not in CACHED_TASKS:
        raise UsageError(
            f"--kv-cache has no effect for {config.task}",
            expected=f"--kv-cache with {' or '.join(sorted(CACHED_TASKS))}",
            hint="drop the option",
        )
    return config.task == "text-generation" if options.kv_cache is None else options.kv_cache


def takes_positions(config: GPTConfig, options: Options) -> bool:
    """Whether the graph takes ``position_ids``: new tokens after a cache have no default positions."""
    return options.position_ids or has_cache(config, options) or "position_ids" in INPUTS[config.task]
