"""The variables of a SavedModel: a TensorFlow checkpoint of two data files and their index, planned, not saved.

The first data file holds the weights and nothing else, in sorted order of their canonical names, each at a multiple
of 64 bytes (TensorFlow reads them at any offset): it can be written before TensorFlow has said a word, and is
OpenAI's own data file byte for byte where that is the source. The second holds the object graph, in which TensorFlow
looks for the variables.
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
#: Generous estimates of what the index and the object graph take, in bytes per weight and in all (measured: 90, 130).
INDEX_BYTES, OBJECT_BYTES, OTHER_BYTES = 128, 160, 4096


class Named(Protocol):
    """What TensorFlow says of a graph's variables.

    Attributes:
        object_graph: the string that it keeps under :data:`OBJECT_GRAPH_KEY`.
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
        graph: asked when the bytes of the second data file are wanted, and again for the index; given an event that
            says when nobody wants them any more.
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
