"""One reading of the source: checksums compared, values looked at, bytes hashed.

Every stored tensor passes once through the cache in small blocks, and each block is shown to
whoever wants it: the container's own checksum, the search for NaN and infinities, SHA-256. Digests are kept by where
the bytes lie, so a tensor that is exported as it is stored is not read again.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import google_crc32c

from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import FileChecksum, LazyTensor, Segment, Stored, TensorSet, merge_segments
from gptconvert.publish.finite import Values, checked_chunks, is_float, raw_bytes
from gptconvert.publish.source_reader import SourceReader, StoppedError

_ALGORITHMS: Mapping[str, Callable[[bytes, int], int]] = {
    "crc32": zlib.crc32,
    "crc32c": lambda data, crc: int(google_crc32c.extend(crc, data)),
}
_DAMAGED = "the file is damaged, or files of different checkpoints were mixed; fetch it again"
#: Last parts of the names of tensors that are all zero in many healthy models.
_MAY_BE_ZERO = {"b", "bias", "beta"}

Place = tuple[Segment, ...]


@dataclass(frozen=True)
class TensorDigests:
    """SHA-256 of stored bytes, by where they lie.

    Attributes:
        by_place: merged segments → hex digest.
    """

    by_place: Mapping[Place, str]

    def of(self, tensor: LazyTensor) -> str | None:
        """The digest of a tensor's row-major bytes, if they lie in files and were read."""
        place = tensor.segments()
        return None if place is None else self.by_place.get(merge_segments(place))


def sha256_of(name: str, tensor: LazyTensor) -> str:
    """SHA-256 of a tensor's row-major bytes, read or computed now.

    Raises:
        InputError: its file cannot be read.
        UnsupportedError: a cast in it overflows.
    """
    sha, place = hashlib.sha256(), tensor.segments()
    if place is None:
        for chunk in checked_chunks(name, tensor):
            sha.update(raw_bytes(chunk))
    else:
        with SourceReader() as reader:
            for block in reader.blocks(place):
                sha.update(block)
    return sha.hexdigest()


@dataclass
class _Checksum:
    """A recorded checksum being recomputed."""

    recorded: FileChecksum
    value: int = 0

    def update(self, data: bytes) -> None:
        self.value = _ALGORITHMS[self.recorded.algorithm](data, self.value)

    def problem(self) -> InputError | None:
        if self.value == self.recorded.value:
            return None
        return InputError(
            f"{self.recorded.algorithm} checksum does not match",
            path=self.recorded.segment.path,
            item=self.recorded.what,
            expected=f"{self.recorded.value:#010x}",
            found=f"{self.value:#010x}",
            hint=_DAMAGED,
        )


@dataclass
class Reading:
    """What is wanted of one run of bytes."""

    place: Place
    name: str = ""
    tensor: LazyTensor | None = None
    values: Values | None = None
    checksums: list[_Checksum] = field(default_factory=list)
    sha256: hashlib._Hash | None = None

    def update(self, data: bytes) -> None:
        """The next bytes, from the first to the last without a gap."""
        self.check(data)
        if self.sha256 is not None:
            self.sha256.update(data)

    def check(self, data: bytes) -> None:
        """The same without SHA-256, which costs ten times as much: who shows the bytes may have it done elsewhere."""
        for checksum in self.checksums:
            checksum.update(data)
        if self.values is not None:
            self.values.update(data)


class SourceScan:
    """Everything that is to be found out about the bytes of the source tensors in use, each read once.

    Who reads bytes for another purpose may take what is wanted of them (:meth:`take`) and show them;
    :meth:`read_rest` reads the others.

    Args:
        checkpoint: what is exported; its dropped tensors are not read.
        tensors: those whose bytes are to be hashed; ones that lie in no file are passed over.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: Iterable[LazyTensor] = ()) -> None:
        used = {name: t for name, t in checkpoint.source.tensors.items() if name not in checkpoint.dropped}
        readings: dict[Place, Reading] = {}
        for name, tensor in used.items():
            if isinstance(tensor, Stored):
                _want_checks(readings, name, tensor)
        for recorded in _relevant(checkpoint.source.tensors, used):
            _reading(readings, (recorded.segment,)).checksums.append(_Checksum(recorded))
        for tensor in tensors:
            if (place := tensor.segments()) is not None and tensor.nbytes:
                _reading(readings, place).sha256 = hashlib.sha256()
        self._all = list(readings.values())
        self._free = readings
        self._looked_at = [Reading((), n, t, Values(t.dtype)) for n, t in used.items() if not isinstance(t, Stored)]

    def take(self, place: Place) -> Reading | None:
        """What is wanted of just these bytes, for who will show them; None: nothing, or it was taken before."""
        return self._free.pop(merge_segments(place), None)

    def read_rest(self, stop: threading.Event | None = None) -> None:
        """Read what nobody took.

        Raises:
            InputError: a file cannot be read.
            StoppedError: asked to stop.
        """
        with SourceReader(stop) as reader:
            for reading in sorted(self._free.values(), key=lambda r: (r.place[0].path, r.place[0].offset)):
                for block in reader.blocks(reading.place):
                    reading.update(block)
        self._free = {}
        for reading in self._looked_at:
            _look(reading, stop)

    def judge(self, *, allow_nonfinite: bool = False) -> tuple[str, ...]:
        """Once every byte was seen: what the user should know about the values.

        Raises:
            InputError: checksums do not match, or values are not finite. All tensors are listed.
        """
        return _judge([*self._all, *self._looked_at], allow_nonfinite)

    def digests(self) -> TensorDigests:
        """What was hashed, once every byte was."""
        digests = {r.place: r.sha256.hexdigest() for r in self._all if r.sha256}
        return TensorDigests({(): hashlib.sha256().hexdigest()} | digests)


def _reading(readings: dict[Place, Reading], place: Place) -> Reading:
    place = merge_segments(place)
    return readings.setdefault(place, Reading(place))


def _want_checks(readings: dict[Place, Reading], name: str, tensor: Stored) -> None:
    if not tensor.nbytes:
        return
    reading = _reading(readings, tensor.parts)
    if reading.tensor is None:
        reading.name, reading.tensor = name, tensor
        reading.values = Values(tensor.dtype) if is_float(tensor.dtype) else None
    if tensor.crc32c is not None:
        recorded = FileChecksum(tensor.parts[0], "crc32c", tensor.crc32c, name)
        reading.checksums.append(_Checksum(recorded))


def _look(reading: Reading, stop: threading.Event | None) -> None:
    """Values of a tensor that its container does not store plainly."""
    tensor, values = reading.tensor, reading.values
    if tensor is None or values is None or not is_float(tensor.dtype):
        return
    for chunk in tensor.chunks():
        if stop is not None and stop.is_set():
            raise StoppedError
        values.look(chunk)


def _relevant(tensors: TensorSet, used: Mapping[str, LazyTensor]) -> list[FileChecksum]:
    """Recorded checksums, less those of bytes that only dropped tensors lie in."""
    needed = _Spans(tensor for tensor in used.values())
    dropped = _Spans(tensor for name, tensor in tensors.items() if name not in used)
    return [c for c in tensors.checksums if c.segment in needed or c.segment not in dropped]


class _Spans:
    """Which bytes of which files stored tensors take."""

    def __init__(self, tensors: Iterable[LazyTensor]) -> None:
        parts = [part for tensor in tensors if isinstance(tensor, Stored) for part in tensor.parts]
        self._by_path: dict[str, list[tuple[int, int]]] = {}
        for part in parts:
            self._by_path.setdefault(part.path, []).append((part.offset, part.end))
        for spans in self._by_path.values():
            spans.sort()

    def __contains__(self, segment: Segment) -> bool:
        spans = self._by_path.get(segment.path, [])
        before = bisect_right(spans, (segment.end - 1, segment.end))
        # Tensors may share bytes, so the span that begins last need not be the one that reaches furthest.
        return any(end > segment.offset for _, end in spans[:before])


def _judge(readings: Iterable[Reading], allow_nonfinite: bool) -> tuple[str, ...]:
    """Notes on what was seen; raises what must not be."""
    notes: list[str] = []
    problems: list[InputError] = []
    for reading in readings:
        wrong = [problem for c in reading.checksums if (problem := c.problem()) is not None]
        problems += wrong
        if wrong or reading.values is None or reading.tensor is None:
            continue
        path = reading.place[0].path if reading.place else None
        complaint = reading.values.complaint(reading.tensor.shape)
        if complaint is not None and allow_nonfinite:
            notes.append(f"{reading.name}: {complaint}")
        elif complaint is not None:
            hint = "the checkpoint is damaged or its training diverged; --allow-nonfinite converts it all the same"
            problems.append(InputError(complaint, path=path, item=reading.name, hint=hint))
        elif not reading.values.nonzero and reading.name.replace("/", ".").split(".")[-1] not in _MAY_BE_ZERO:
            notes.append(f"{reading.name} is all zeros")
    if problems:
        raise _together(problems)
    return tuple(notes)


def _together(problems: list[InputError]) -> InputError:
    if len(problems) == 1:
        return problems[0]
    lines = [f"{len(problems)} tensors are damaged", *(f"  {problem}" for problem in problems)]
    return InputError("\n".join(lines), path=problems[0].path, item=problems[0].item, hint=problems[0].hint)
