"""The variables of a SavedModel: a TensorFlow checkpoint of one data file and its index, planned, not saved.

The data file holds the object graph, which TensorFlow needs to find the variables, and then the weights in sorted
order of their canonical names, each at a multiple of 64 bytes (TensorFlow reads them at any offset).
Format of strings: tensorflow/core/util/tensor_bundle/tensor_bundle.cc, ``WriteStringTensor``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from gptconvert.targets.plan import Placed, PlannedFile, place
from gptconvert.targets.tf_index import DATA_TYPES, DT_STRING, Entry, bundle_index, masked
from gptconvert.targets.varint import varint
from gptconvert.tensors import LazyTensor

OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
DATA, INDEX = "variables.data-00000-of-00001", "variables.index"


def plan_bundle(
    directory: str, weights: Mapping[str, LazyTensor], keys: Mapping[str, str], object_graph: bytes
) -> tuple[PlannedFile, PlannedFile]:
    """Data file and index in ``directory``.

    Args:
        directory: relative to the output.
        weights: canonical name → tensor as stored.
        keys: canonical name → name in the checkpoint.
        object_graph: the string TensorFlow keeps under :data:`OBJECT_GRAPH_KEY`.
    """
    text, checksum = string_scalar(object_graph)
    graph = Entry(OBJECT_GRAPH_KEY, DT_STRING, (), 0, len(text), checksum)
    placed, size = place(((keys[name], weights[name], name) for name in sorted(weights)), len(text))

    def finish(crc32c: Callable[[Placed], int]) -> bytes:
        return bundle_index([graph, *(_entry(item, crc32c(item)) for item in placed)])

    index_size = len(finish(lambda item: 0))  # checksums have a fixed width
    return (
        PlannedFile(f"{directory}/{DATA}", size, text, placed),
        PlannedFile(f"{directory}/{INDEX}", index_size, finish=finish),
    )


def _entry(item: Placed, crc32c: int) -> Entry:
    tensor = item.tensor
    return Entry(item.name, DATA_TYPES[tensor.dtype], tensor.shape, item.offset, tensor.nbytes, crc32c)


def string_scalar(content: bytes) -> tuple[bytes, int]:
    """A scalar string tensor as it lies in a data file, and its CRC32C.

    In the file: length as varint, checksum of the length, content. The checksums take the length as four bytes.
    """
    import google_crc32c

    length = struct.pack("<I", len(content))
    guard = struct.pack("<I", masked(google_crc32c.value(length)))
    checksum: int = google_crc32c.value(length + guard + content)
    return varint(len(content)) + guard + content, checksum
