"""LiteRT files, one of each type. TensorFlow's converter makes them from the graph of the SavedModel.

Their bytes come from TensorFlow, so they are made in the background and written last. The converter holds the model
in memory several times, and its file format ends at 2 GiB.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from gptconvert.containers.tflite import MAX_BYTES
from gptconvert.errors import UnsupportedError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Export, Placed, PlannedFile
from gptconvert.model.int8 import Int8Rows
from gptconvert.model.options import TFLITE_QUANTISED, Options
from gptconvert.model.tensors import LazyTensor
from gptconvert.targets.lossy import check_used
from gptconvert.targets.saved_model.process import require_tensorflow
from gptconvert.targets.tflite.build import Built
from gptconvert.targets.tflite.forms import FILES, form_of, stored_as
from gptconvert.verify.runners import available_memory

NAME = "tflite"
#: ``--dtype`` → the type of file that has it.
OF_DTYPE: Mapping[str | None, str] = {None: "f32", "fp32": "f32", "fp16": "f16"}
#: Activation → why LiteRT cannot compute it.
REFUSED: Mapping[str, str] = {
    "laplace": "it has no built-in operator for erf",
    "sqrt_softplus": "it computes softplus as log(1 + exp(x)), whose square root is wrong far below 0",
}
#: Generous size of the graph in bytes, constant and per layer (measured for GPT-2: 90 000 and 30 000).
GRAPH_BYTES, LAYER_BYTES = 250_000, 80_000
#: Copies of the scales of 8-bit matrices: three graphs with a scale and a zero point of 8 bytes, and one for lookups.
SCALE_COPIES = 10
#: Memory of the converter beside the weights, and as a multiple of their bytes in float32 (measured: 7.1 at 355M).
MEMORY, MEMORY_FACTOR = 1 << 30, 7
#: Above this, a note states how much memory the conversion needs.
MUCH = 4 << 30


def plan(checkpoint: Checkpoint, options: Options) -> tuple[Export, ...]:
    """One export for each type. TensorFlow starts only when the files are written.

    Raises:
        UnsupportedError: TensorFlow is not installed, or cannot hold the model; or LiteRT lacks the type, or the
            activation.
        UsageError: an option has no effect.
    """
    require_tensorflow()
    check_used(options, options.tflite_type, TFLITE_QUANTISED, "--tflite-type int8")
    if reason := REFUSED.get(checkpoint.config.activation):
        raise UnsupportedError(
            f"LiteRT cannot compute the activation {checkpoint.config.activation}: {reason}",
            hint="use --to onnx, which preserves it",
        )
    chosen = kinds(options)
    notes = _check_size(checkpoint, available_memory())
    built = Built(checkpoint, chosen)
    return tuple(_export(checkpoint, kind, built, () if number else notes) for number, kind in enumerate(chosen))


def kinds(options: Options) -> list[str]:
    """The types of the files to write, each once.

    Raises:
        UnsupportedError: ``--dtype`` chooses a type that LiteRT lacks.
    """
    if options.tflite_type:
        return list(dict.fromkeys(options.tflite_type))
    if options.dtype not in OF_DTYPE:
        raise UnsupportedError(
            "LiteRT does not compute with this type of weights",
            item="--dtype",
            expected="fp32 or fp16",
            found=options.dtype,
            hint="choose the type of the file: --tflite-type f32",
        )
    return [OF_DTYPE[options.dtype]]


def _check_size(checkpoint: Checkpoint, free: int) -> tuple[str, ...]:
    """A note on the memory that a large model needs.

    Raises:
        UnsupportedError: the model exceeds the format, or the memory.
    """
    nbytes = sum(4 * weight.size for weight in checkpoint.weights.values()) + _graph_bytes(checkpoint)
    if nbytes > MAX_BYTES:
        raise UnsupportedError(
            "the model is too large for LiteRT's file format, in which every type is first made in float32",
            expected=f"at most {MAX_BYTES} bytes in float32",
            found=f"{nbytes} bytes",
            hint="use --to gguf or --to onnx --quantize q8, which have no such limit",
        )
    needed = MEMORY + MEMORY_FACTOR * nbytes
    if free < needed:
        raise UnsupportedError(
            "the model is too large for TensorFlow's converter on this machine",
            expected=f"{needed} bytes of memory",
            found=f"{free} bytes available",
            hint="convert it on a machine with more memory",
        )
    return (f"TensorFlow's converter needs about {needed / 1e9:.1f} GB of memory",) if needed > MUCH else ()


def _graph_bytes(checkpoint: Checkpoint) -> int:
    return GRAPH_BYTES + LAYER_BYTES * checkpoint.config.n_layer


def _export(checkpoint: Checkpoint, kind: str, built: Built, notes: tuple[str, ...]) -> Export:
    stored = stored_as(checkpoint, lambda name, shape: form_of(kind, name, shape))
    parts = [part for weight in stored.weights.values() for part in _parts(weight)]
    nbytes = sum(part.nbytes for part in parts)
    file = PlannedFile(FILES[kind], nbytes + _graph_bytes(checkpoint), finish=_finish(built, kind))
    return Export(NAME, FILES[kind], stored, (file,), kind, notes)


def _parts(weight: LazyTensor) -> Sequence[LazyTensor]:
    """What stores a weight; each row of an 8-bit matrix has a scale and a zero point, in every graph."""
    return [weight.codes, *[weight.scales] * SCALE_COPIES] if isinstance(weight, Int8Rows) else [weight]


def _finish(built: Built, kind: str) -> Callable[[Callable[[Placed], int], threading.Event], bytes]:
    return lambda crc32c, stop: built.take(kind, stop)
