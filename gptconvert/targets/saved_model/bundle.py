"""The variables of a SavedModel: a TensorFlow checkpoint of two data files and an index, written without TensorFlow.

The first data file holds only the weights, sorted by canonical name, each at a multiple of 64 bytes (TensorFlow reads
them at any offset). It can be written before TensorFlow has built the graph, and equals OpenAI's data file, byte for
byte, if that is the source. The second holds the object graph, in which TensorFlow looks up the variables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from gptconvert.containers.tf_bundle import string_scalar
from gptconvert.containers.tf_index import DATA_TYPES, DT_STRING, Entry, index_bytes
from gptconvert.model.export import Placed, PlannedFile, place
from gptconvert.model.tensors import LazyTensor

OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
WEIGHTS, OBJECTS, INDEX = "variables.data-00000-of-00002", "variables.data-00001-of-00002", "variables.index"
#: Generous sizes of the index and the object graph: bytes per weight (measured: 90, 130) and a constant part.
INDEX_BYTES, OBJECT_BYTES, OTHER_BYTES = 128, 160, 4096


class Named(Protocol):
    """TensorFlow's names for a graph's variables.

    Attributes:
        object_graph: the string stored under :data:`OBJECT_GRAPH_KEY`.
        keys: canonical name → name in the checkpoint.
    """

    @property
    def object_graph(self) -> bytes: ...
    @property
    def keys(self) -> Mapping[str, str]: ...


def plan_bundle(
    directory: str,
    weights: Mapping[str, LazyTensor],
    graph: Callable[[threading.Event], Named],
    transposed: frozenset[str] = frozenset(),
) -> tuple[PlannedFile, PlannedFile, PlannedFile]:
    """Both data files and the index, in ``directory``.

    Args:
        directory: relative to the output.
        weights: canonical name → tensor as stored.
        graph: called for the bytes of the second data file, and again for the index, with an event that is set on
            cancellation.
        transposed: names of the weights that are stored transposed.
    """
    placed, size = place((name, weights[name], name) for name in sorted(weights))
    placed = tuple(replace(p, transposed=p.name in transposed) for p in placed)

    def objects(crc32c: Callable[[Placed], int], stop: threading.Event) -> bytes:
        return string_scalar(graph(stop).object_graph)[0]

    def index(crc32c: Callable[[Placed], int], stop: threading.Event) -> bytes:
        named = graph(stop)
        text, checksum = string_scalar(named.object_graph)
        entries = {named.keys[p.name]: _entry(p, crc32c(p)) for p in placed}
        entries[OBJECT_GRAPH_KEY] = Entry(DT_STRING, (), 0, len(text), checksum, shard=1)
        return index_bytes(entries, shards=2)

    return (
        PlannedFile(f"{directory}/{WEIGHTS}", size, tensors=placed),
        PlannedFile(f"{directory}/{OBJECTS}", OTHER_BYTES + OBJECT_BYTES * len(placed), finish=objects),
        PlannedFile(f"{directory}/{INDEX}", OTHER_BYTES + INDEX_BYTES * len(placed), finish=index),
    )


def _entry(placed: Placed, crc32c: int) -> Entry:
    tensor = placed.tensor
    return Entry(DATA_TYPES[tensor.dtype], tensor.shape, placed.offset, tensor.nbytes, crc32c)
