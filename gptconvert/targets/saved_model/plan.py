"""The SavedModel files: graph, variables and their index. Weights never pass through TensorFlow.

TensorFlow, in a process of its own, builds the graph around empty variables. Meanwhile, the weights are copied from
the source into their data file as for any other target; the other files are made from TensorFlow's results.
``fingerprint.pb`` is left out: it is optional, and contains a random uuid.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gptconvert.errors import UnsupportedError, install_hint
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import FLOATS
from gptconvert.model.encodings import cast_to
from gptconvert.model.export import Export, PlannedFile
from gptconvert.model.options import Options
from gptconvert.model.tensors import LazyTensor
from gptconvert.targets.layout import as_stored
from gptconvert.targets.saved_model.bundle import plan_bundle
from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess, require_tensorflow

NAME, DIRECTORY = "tf", "saved_model"
#: Generous size of the graph in bytes, constant and per layer (measured for GPT-2: 120 000 and 52 000); twice that
#: with compiled twins.
GRAPH_BYTES, LAYER_BYTES = 180_000, 60_000


@dataclass(frozen=True)
class BuiltGraph:
    """A graph built by TensorFlow.

    Attributes:
        saved_model: content of ``saved_model.pb``.
        object_graph: the tree of variables, as stored in the checkpoint.
        keys: canonical name → checkpoint key.
    """

    saved_model: bytes
    object_graph: bytes
    keys: Mapping[str, str]


def plan(checkpoint: Checkpoint, options: Options) -> tuple[Export, ...]:
    """One export: the directory ``saved_model``, with ``saved_model.pb`` last: it marks the directory as complete.

    TensorFlow starts only when the files are written.

    Raises:
        UnsupportedError: TensorFlow is not installed, or a weight's type cannot be stored in a checkpoint.
    """
    require_tensorflow()
    checkpoint = cast_to(checkpoint, options.dtype)
    weights = {name: stored(name, weight) for name, weight in checkpoint.weights.items()}
    for name, weight in weights.items():
        if weight.dtype not in FLOATS:
            raise UnsupportedError("weights of this type cannot be written", item=name, found=weight.dtype)
    transposed = [name for name, weight in checkpoint.weights.items() if weight is not weights[name]]
    built: list[BuiltGraph] = []

    def graph(stop: threading.Event) -> BuiltGraph:
        """The graph, built for the first file that needs it."""
        if not built:
            built.append(build_graph(checkpoint, weights, options.xla, stop))
        return built[0]

    nbytes = (GRAPH_BYTES + LAYER_BYTES * checkpoint.config.n_layer) * (2 if options.xla else 1)
    files = (
        *plan_bundle(f"{DIRECTORY}/variables", weights, graph, frozenset(transposed)),
        PlannedFile(f"{DIRECTORY}/saved_model.pb", nbytes, finish=lambda crc32c, stop: graph(stop).saved_model),
    )
    return (Export(NAME, DIRECTORY, checkpoint, files),)


def stored(name: str, weight: LazyTensor) -> LazyTensor:
    """A weight as stored in the file: a transposed matrix keeps the source's layout, and the graph transposes it."""
    return as_stored(name, weight)[0]


def build_graph(
    checkpoint: Checkpoint, weights: Mapping[str, LazyTensor], xla: bool, stop: threading.Event | None = None
) -> BuiltGraph:
    """The graph for weights stored as ``weights``.

    Raises:
        UnsupportedError: TensorFlow cannot build it, or ``stop`` was set first.
    """
    flipped = [name for name, weight in checkpoint.weights.items() if weight is not weights[name]]
    described = description(checkpoint, weights, flipped)
    try:
        with TensorFlowProcess() as tensorflow:
            answer = tensorflow.ask("build", stop, **described, xla=xla, directory=tensorflow.directory)
            saved_model, objects = (_read(tensorflow.directory, name) for name in ("saved_model.pb", "object_graph"))
    except TensorFlowError as error:
        raise UnsupportedError(
            f"TensorFlow could not build the graph: {error}",
            hint=f"install TensorFlow 2.18 to 2.21: {install_hint('tf')}",
        ) from error
    return BuiltGraph(saved_model, objects, answer["keys"])


def description(
    checkpoint: Checkpoint, weights: Mapping[str, LazyTensor], flipped: Iterable[str]
) -> dict[str, object]:
    """The fields of a request that determine the graph: those of the model, and the weights as stored."""
    return {
        "config": checkpoint.config.as_dict(),
        "special": dataclasses.asdict(checkpoint.special_ids),
        "weights": {name: (weight.dtype.name, weight.shape) for name, weight in sorted(weights.items())},
        "flipped": list(flipped),
    }


def _read(directory: str, name: str) -> bytes:
    with open(os.path.join(directory, name), "rb") as file:
        return file.read()
