"""The checksum pass over the source: compare recorded checksums, check values, hash bytes. Each byte is read once.

Stored tensors are read in blocks small enough for the processor's cache, from which every consumer reads them: the
container's checksum, the check for NaN and infinities, SHA-256. Digests are kept by location, so that tensors
exported as stored are not read again.
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
from gptconvert.publish.finite import FiniteCheck, checked_chunks, is_float, raw_bytes
from gptconvert.publish.io_settings import DEFAULT_IO, IoSettings
from gptconvert.publish.source_reader import SourceReader, StoppedError

_ALGORITHMS: Mapping[str, Callable[[bytes, int], int]] = {
    "crc32": zlib.crc32,
    "crc32c": lambda data, crc: int(google_crc32c.extend(crc, data)),
}
_DAMAGED = "the file is damaged, or files of different checkpoints were mixed; fetch it again"
#: Last name component of tensors that are all zeros in many healthy models.
_MAY_BE_ZERO = {"b", "bias", "beta"}

#: The segments in which a tensor is stored, contiguous ones merged.
Location = tuple[Segment, ...]


@dataclass(frozen=True)
class TensorDigests:
    """SHA-256 of stored bytes.

    Attributes:
        by_location: merged segments → hex digest.
    """

    by_location: Mapping[Location, str]

    def of(self, tensor: LazyTensor) -> str | None:
        """The digest of a tensor's row-major bytes; None if they are not stored in files or were not hashed."""
        segments = tensor.segments()
        return None if segments is None else self.by_location.get(merge_segments(segments))


def sha256_of(name: str, tensor: LazyTensor, settings: IoSettings = DEFAULT_IO) -> str:
    """SHA-256 of a tensor's row-major bytes, read or computed now.

    Raises:
        InputError: a file cannot be read.
        UnsupportedError: a cast overflows.
    """
    digest, segments = hashlib.sha256(), tensor.segments()
    if segments is None:
        for chunk in checked_chunks(name, tensor):
            digest.update(raw_bytes(chunk))
    else:
        with SourceReader(settings=settings) as reader:
            for block in reader.blocks(segments):
                digest.update(block)
    return digest.hexdigest()


@dataclass
class _RunningChecksum:
    """A checksum recorded in the container, and the value computed so far."""

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
class ScanTask:
    """The consumers of the bytes at one location, or of one computed tensor's values.

    Attributes:
        location: the bytes; empty for a computed tensor.
        name: the tensor's name in the source.
        tensor: the tensor at this location; None if only a checksum or a digest needs the bytes.
        finite: the check of the values.
        checksums: recorded checksums to compare.
        sha256: hash to update with every byte.
    """

    location: Location
    name: str = ""
    tensor: LazyTensor | None = None
    finite: FiniteCheck | None = None
    checksums: list[_RunningChecksum] = field(default_factory=list)
    sha256: hashlib._Hash | None = None

    def update(self, data: bytes) -> None:
        """Feed the next bytes, in order and without gaps, to every consumer."""
        self.update_checks(data)
        if self.sha256 is not None:
            self.sha256.update(data)

    def update_checks(self, data: bytes) -> None:
        """Feed every consumer except SHA-256, which is ten times slower and can run in another thread."""
        for checksum in self.checksums:
            checksum.update(data)
        if self.finite is not None:
            self.finite.update(data)


class SourceScan:
    """The checks of all source tensors in use, planned so that each byte is read once.

    Code that reads bytes for another purpose can :meth:`claim` their task and feed it; :meth:`run_unclaimed` reads
    the remaining bytes.

    Args:
        checkpoint: the exported checkpoint; its dropped tensors are not read.
        tensors: tensors to hash; those not stored in files are skipped.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: Iterable[LazyTensor] = ()) -> None:
        used = {name: t for name, t in checkpoint.source.tensors.items() if name not in checkpoint.dropped}
        tasks: dict[Location, ScanTask] = {}
        for name, tensor in used.items():
            if isinstance(tensor, Stored):
                _add_checks(tasks, name, tensor)
        for recorded in _checksums_in_use(checkpoint.source.tensors, used):
            _task_at(tasks, (recorded.segment,)).checksums.append(_RunningChecksum(recorded))
        for tensor in tensors:
            if (segments := tensor.segments()) is not None and tensor.nbytes:
                _task_at(tasks, segments).sha256 = hashlib.sha256()
        self._stored = list(tasks.values())
        self._unclaimed = tasks
        self._computed = [
            ScanTask((), name, tensor, FiniteCheck(tensor.dtype))
            for name, tensor in used.items()
            if not isinstance(tensor, Stored)
        ]

    def claim(self, segments: Location) -> ScanTask | None:
        """Take over the task for exactly these bytes; None if it does not exist or is already claimed."""
        return self._unclaimed.pop(merge_segments(segments), None)

    def run_unclaimed(self, stop: threading.Event | None = None, settings: IoSettings = DEFAULT_IO) -> None:
        """Run all tasks that were not claimed, and check computed tensors.

        Args:
            stop: cancellation event.
            settings: the file system, and how much to read at once.

        Raises:
            InputError: a file cannot be read.
            StoppedError: ``stop`` was set.
        """
        with SourceReader(stop, settings) as reader:
            for task in sorted(self._unclaimed.values(), key=lambda t: (t.location[0].path, t.location[0].offset)):
                for block in reader.blocks(task.location):
                    task.update(block)
        self._unclaimed = {}
        for task in self._computed:
            _check_computed(task, stop)

    def check_results(self, *, allow_nonfinite: bool = False) -> tuple[str, ...]:
        """Evaluate the checks once every task is complete; returns notes for the user.

        Raises:
            InputError: checksums do not match, or values are not finite. Lists all affected tensors.
        """
        return _check_results([*self._stored, *self._computed], allow_nonfinite)

    def digests(self) -> TensorDigests:
        """The digests, once every task is complete."""
        digests = {task.location: task.sha256.hexdigest() for task in self._stored if task.sha256}
        return TensorDigests({(): hashlib.sha256().hexdigest()} | digests)


def _task_at(tasks: dict[Location, ScanTask], segments: Location) -> ScanTask:
    location = merge_segments(segments)
    return tasks.setdefault(location, ScanTask(location))


def _add_checks(tasks: dict[Location, ScanTask], name: str, tensor: Stored) -> None:
    """Plan the checks of a stored tensor's values and of its recorded checksum."""
    if not tensor.nbytes:
        return
    task = _task_at(tasks, tensor.parts)
    if task.tensor is None:
        task.name, task.tensor = name, tensor
        task.finite = FiniteCheck(tensor.dtype) if is_float(tensor.dtype) else None
    if tensor.crc32c is not None:
        recorded = FileChecksum(tensor.parts[0], "crc32c", tensor.crc32c, name)
        task.checksums.append(_RunningChecksum(recorded))


def _check_computed(task: ScanTask, stop: threading.Event | None) -> None:
    """Check the values of a tensor that its container does not store as plain bytes."""
    tensor, finite = task.tensor, task.finite
    if tensor is None or finite is None or not is_float(tensor.dtype):
        return
    for chunk in tensor.chunks():
        if stop is not None and stop.is_set():
            raise StoppedError
        finite.update_array(chunk)


def _checksums_in_use(tensors: TensorSet, used: Mapping[str, LazyTensor]) -> list[FileChecksum]:
    """The recorded checksums, except those of bytes that only dropped tensors use."""
    needed = _ByteRanges(used.values())
    dropped = _ByteRanges(tensor for name, tensor in tensors.items() if name not in used)
    return [c for c in tensors.checksums if c.segment in needed or c.segment not in dropped]


class _ByteRanges:
    """The byte ranges that stored tensors occupy in files."""

    def __init__(self, tensors: Iterable[LazyTensor]) -> None:
        self._by_path: dict[str, list[tuple[int, int]]] = {}
        for part in (part for tensor in tensors if isinstance(tensor, Stored) for part in tensor.parts):
            self._by_path.setdefault(part.path, []).append((part.offset, part.end))
        for ranges in self._by_path.values():
            ranges.sort()

    def __contains__(self, segment: Segment) -> bool:
        """Whether any range overlaps ``segment``."""
        ranges = self._by_path.get(segment.path, [])
        before = bisect_right(ranges, (segment.end - 1, segment.end))
        # Ranges may overlap, so the one that starts last may not be the one that ends last.
        return any(end > segment.offset for _, end in ranges[:before])


def _check_results(tasks: Iterable[ScanTask], allow_nonfinite: bool) -> tuple[str, ...]:
    notes: list[str] = []
    problems: list[InputError] = []
    for task in tasks:
        mismatches = [error for c in task.checksums if (error := c.problem()) is not None]
        problems += mismatches
        if mismatches or task.finite is None or task.tensor is None:
            continue
        problem = task.finite.problem(task.tensor.shape)
        if problem is not None and allow_nonfinite:
            notes.append(f"{task.name}: {problem}")
        elif problem is not None:
            path = task.location[0].path if task.location else None
            hint = "the checkpoint is damaged or its training diverged; convert it anyway with --allow-nonfinite"
            problems.append(InputError(problem, path=path, item=task.name, hint=hint))
        elif not task.finite.nonzero and task.name.replace("/", ".").split(".")[-1] not in _MAY_BE_ZERO:
            notes.append(f"{task.name} is all zeros")
    if problems:
        raise _combined(problems)
    return tuple(notes)


def _combined(problems: list[InputError]) -> InputError:
    """Combine all problems in one error."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"{len(problems)} tensors are damaged", *(f"  {problem}" for problem in problems)]
    return InputError("\n".join(lines), path=problems[0].path, item=problems[0].item, hint=problems[0].hint)
