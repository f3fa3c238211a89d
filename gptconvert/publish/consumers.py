"""The consumers of a placed tensor's bytes during writing."""

from __future__ import annotations

import hashlib

import google_crc32c

from gptconvert.model.export import Placed
from gptconvert.model.tensors import Segment, Stored, merge_segments
from gptconvert.publish.source_scan import ScanTask, SourceScan


class TensorConsumers:
    """Scan tasks claimed for a placed tensor's bytes, and its CRC-32C.

    Args:
        placed: the tensor.
        scan: the scan from which to claim the tasks of the whole tensor and of each of its segments.
        crc32c: whether its checksum is needed.

    Attributes:
        crc32c: unmasked, of the bytes so far, or of all bytes if the source records it; 0 if not needed.
    """

    def __init__(self, placed: Placed, scan: SourceScan | None = None, *, crc32c: bool = False) -> None:
        segments = merge_segments(placed.tensor.segments() or ())
        self._tasks = {} if scan is None or not segments else _claim(scan, segments)
        self.crc32c, self._compute_crc32c = 0, crc32c
        tensor = placed.tensor
        if isinstance(tensor, Stored) and tensor.dtype.isnative and tensor.crc32c is not None:
            self.crc32c, self._compute_crc32c = tensor.crc32c, False  # the scan compares it with the bytes

    def update(self, segment: Segment, data: bytes) -> list[hashlib._Hash]:
        """Feed the next bytes of a segment; returns the hashes left to update with them, in any thread."""
        tasks = [self._tasks[key] for key in (None, segment) if key in self._tasks]
        for task in tasks:
            task.update_checks(data)
        self.update_crc32c(data)
        return [task.sha256 for task in tasks if task.sha256 is not None]

    def update_crc32c(self, data: bytes | memoryview) -> None:
        """Feed the next bytes of a computed tensor, whose only possible consumer is the CRC-32C."""
        if self._compute_crc32c:
            self.crc32c = google_crc32c.extend(self.crc32c, bytes(data))

    def complete(self, segment: Segment) -> None:
        """End the segment's own task, since the segment may occur again in this tensor."""
        self._tasks.pop(segment, None)


def _claim(scan: SourceScan, segments: tuple[Segment, ...]) -> dict[Segment | None, ScanTask]:
    """The tasks of the whole tensor (key None) and of single segments."""
    tasks: dict[Segment | None, ScanTask | None] = {None: scan.claim(segments)}
    if len(segments) > 1:
        tasks |= {segment: scan.claim((segment,)) for segment in dict.fromkeys(segments)}
    return {key: task for key, task in tasks.items() if task is not None}
