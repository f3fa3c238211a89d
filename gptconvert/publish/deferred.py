"""Deferred files, whose bytes are produced by a background thread while the other files are written."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

from gptconvert.model.export import Placed, PlannedFile
from gptconvert.publish.source_reader import StoppedError

#: Interval at which a wait for a checksum polls the cancellation event.
POLL_SECONDS = 0.05


class DeferredFiles:
    """Calls every :attr:`PlannedFile.finish` of ``files``, in order, in one background thread.

    Args:
        files: all files to write.
        stop: cancellation event, set by whichever thread fails first.

    Attributes:
        need_checksums: whether deferred files exist, which may need the checksums of placed tensors.
    """

    def __init__(self, files: Iterable[PlannedFile], stop: threading.Event) -> None:
        files = list(files)
        deferred = [file for file in files if file.finish is not None]
        self._stop = stop
        self.need_checksums = bool(deferred)
        self._checksums: dict[int, Future[int]] = {
            id(placed): Future() for file in files if deferred for placed in file.tensors
        }
        self._pool = ThreadPoolExecutor(1)
        self._contents = [(file, self._pool.submit(self._finish, file)) for file in deferred]

    def set_checksum(self, placed: Placed, crc32c: int) -> None:
        """Provide the unmasked CRC-32C of a placed tensor's bytes."""
        self._checksums[id(placed)].set_result(crc32c)

    def contents(self) -> Sequence[tuple[PlannedFile, bytes]]:
        """Wait for the deferred files; returns them with their bytes.

        Raises:
            StoppedError: another thread failed.
            Exception: a ``finish`` raised it.
        """
        return [(file, future.result()) for file, future in self._contents]

    def close(self) -> None:
        """Wait for the thread."""
        self._pool.shutdown(cancel_futures=True)

    def error(self) -> BaseException | None:
        """The first error that a ``finish`` raised."""
        done = (future for _, future in self._contents if future.done() and not future.cancelled())
        errors = (error for future in done if (error := future.exception()) is not None)
        return next((error for error in errors if not isinstance(error, StoppedError)), None)

    def _finish(self, file: PlannedFile) -> bytes:
        if self._stop.is_set() or file.finish is None:
            raise StoppedError
        try:
            return file.finish(self._wait_for_checksum, self._stop)
        except BaseException:
            if self._stop.is_set():  # failed because it was cancelled
                raise StoppedError from None
            self._stop.set()
            raise

    def _wait_for_checksum(self, placed: Placed) -> int:
        while not self._stop.is_set():
            try:
                return self._checksums[id(placed)].result(POLL_SECONDS)
            except FutureTimeout:
                continue
        raise StoppedError
