"""Quantised graphs of our own: how the file says they were quantised, and the form of them that can be proven.

``MatMulNBits`` at accuracy level 4 rounds activations to 8 bits, which no reference can reproduce. Rule 2 therefore
runs the same bytes without that attribute; rule 3 judges the graph as it is shipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gptconvert.errors import InputError
from gptconvert.model.blocks import CODES, SCALES, BlockEncoding, Quantised
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.encodings import QUANTISED, quantised
from gptconvert.model.options import DEFAULTS, INFO
from gptconvert.model.tensors import Array, LazyTensor
from gptconvert.targets.onnx.file import OnnxFile
from gptconvert.targets.onnx.runner import OnnxRunner, bind
from gptconvert.targets.onnx.variants import BLOCK_KEY, CALIBRATED_KEY, QUANTIZE_KEY
from gptconvert.verify.evaluation import Evaluation
from gptconvert.verify.probes import Probe
from gptconvert.verify.quality import Quality, measure
from gptconvert.verify.run_probes import feeds_of


def recorded(file: OnnxFile) -> Mapping[str, str]:
    """The metadata of a quantised graph of our own; empty if it is neither."""
    entries = {entry.key: entry.value for entry in file.model.metadata_props}
    return entries if file.is_own and QUANTIZE_KEY in entries else {}


def by_recipe(checkpoint: Checkpoint, file: OnnxFile) -> Checkpoint | None:
    """The checkpoint quantised as the file's metadata says; None if the file is not a quantised graph of our own.

    Raises:
        InputError: the metadata names an unknown recipe.
    """
    metadata = recorded(file)
    if not metadata:
        return None
    name, block = metadata[QUANTIZE_KEY], metadata.get(BLOCK_KEY, str(DEFAULTS["block_size"]))
    if name not in QUANTISED or block not in map(str, INFO["block_size"].choices):
        raise InputError(
            "unknown quantisation in the graph's metadata",
            path=file.path,
            expected=f"one of {', '.join(QUANTISED)}, in blocks of {', '.join(map(str, INFO['block_size'].choices))}",
            found=f"{name}, in blocks of {block}"[:80],
        )
    calibrator = _Found(file.initializers) if CALIBRATED_KEY in metadata else None
    return quantised(checkpoint, QUANTISED[name], int(block), calibrator)


@dataclass(frozen=True)
class _Found:
    """Calibrated codes, which only the text could reproduce: those of the file itself."""

    initializers: Mapping[str, LazyTensor]

    def codes(self, name: str, encoding: BlockEncoding) -> LazyTensor:
        stored = f"{name}.{CODES}"
        if stored not in self.initializers:
            raise InputError("codes are missing", item=stored)
        return self.initializers[stored]


def calibration_note(file: OnnxFile, shown_as: str) -> list[str]:
    """A note if codes were not compared with the checkpoint."""
    if CALIBRATED_KEY not in recorded(file):
        return []
    text = "its 4-bit codes were calibrated on a text, so they were not compared with the checkpoint's weights"
    return [f"{shown_as}: {text}; only its checksum and its quality show a change"]


def max_kl_of(file: OnnxFile) -> float | None:
    """The default limit of the mean KL divergence; None for graphs of others."""
    name = recorded(file).get(QUANTIZE_KEY, "")
    return QUANTISED[name].max_kl if name in QUANTISED else None


def as_found(checkpoint: Checkpoint, found: Mapping[str, LazyTensor]) -> Checkpoint:
    """The checkpoint with the parts of its quantised weights read from the file, which rule 1 compares.

    Computing them from the source again, as often as the truth reads them, would search the scales each time.
    """
    weights = {name: _from_file(name, weight, found) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def _from_file(name: str, weight: LazyTensor, found: Mapping[str, LazyTensor]) -> LazyTensor:
    if not isinstance(weight, Quantised):
        return weight
    parts = {part: found.get(f"{name}.{part}", computed) for part, computed in weight.parts.items()}
    if any((parts[p].shape, parts[p].dtype) != (t.shape, t.dtype) for p, t in weight.parts.items()):
        return weight  # rule 1 fails
    return dataclasses.replace(weight, codes=parts[CODES], scales=parts[SCALES])


def with_float_activations(file: OnnxFile) -> OnnxFile:
    """The graph with no accuracy level, so that its arithmetic is float32."""
    return dataclasses.replace(file, omitted="accuracy_level")


def measured(
    file: OnnxFile,
    evaluation: Evaluation,
    advance: Callable[[int], None] | None = None,
    *,
    runner: type[OnnxRunner] = OnnxRunner,
) -> Quality:
    """Rule 3 on a graph as it is shipped.

    Args:
        file: the checked file, of any origin.
        evaluation: the source, and what to measure on.
        advance: called with 1 after each window.
        runner: runs the graph.
    """
    config = evaluation.checkpoint.config
    tokens = max(window.input_ids.size for window in evaluation.windows)
    session = runner(file, bind(file, config), config, prepack=True, tokens=tokens)

    def run(window: Probe) -> Array:
        return session.run(feeds_of(window, config), False).named["logits"]

    stored = as_found(by_recipe(evaluation.checkpoint, file) or evaluation.checkpoint, file.initializers).weights
    lossy = {name: weight for name, weight in stored.items() if isinstance(weight, Quantised)}
    return measure(evaluation, run, max_kl_of(file), lossy, advance)
