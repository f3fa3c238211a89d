"""Files whose bytes are not known when they are planned: made in a thread of their own while others are written."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

from gptconvert.model.export import Placed, PlannedFile
from gptconvert.publish.source_reader import StoppedError

#: How often who waits looks whether everything has stopped.
POLL_SECONDS = 0.05


class DeferredFiles:
    """Calls every :attr:`PlannedFile.finish` of ``files``, in order.

    Args:
        files: all that are written.
        stop: set by whoever fails, here or elsewhere.
    """

    def __init__(self, files: Iterable[PlannedFile], stop: threading.Event) -> None:
        files = list(files)
        self._stop = stop
        self._wanted = any(file.finish is not None for file in files)
        self._checksums: dict[int, Future[int]] = {
            id(placed): Future() for file in files if self._wanted for placed in file.tensors
        }
        self._pool = ThreadPoolExecutor(1)
        unfinished = [file for file in files if file.finish is not None]
        self._contents = [(file, self._pool.submit(self._finish, file)) for file in unfinished]

    @property
    def wanted(self) -> bool:
        """Whether anybody asks for checksums."""
        return self._wanted

    def tell(self, placed: Placed, crc32c: int) -> None:
        """The unmasked CRC32C of a placed tensor's bytes."""
        self._checksums[id(placed)].set_result(crc32c)

    def contents(self) -> Sequence[tuple[PlannedFile, bytes]]:
        """The files and their bytes.

        Raises:
            StoppedError: another thread failed.
            Exception: what a ``finish`` raised.
        """
        return [(file, future.result()) for file, future in self._contents]

    def close(self) -> None:
        """Wait for the thread."""
        self._pool.shutdown(cancel_futures=True)

    def error(self) -> BaseException | None:
        """What a ``finish`` raised."""
        done = (future for _, future in self._contents if future.done() and not future.cancelled())
        errors = (error for future in done if (error := future.exception()) is not None)
        return next((error for error in errors if not isinstance(error, StoppedError)), None)

    def _finish(self, file: PlannedFile) -> bytes:
        if self._stop.is_set() or file.finish is None:
            raise StoppedError
        try:
            return file.finish(self._crc32c, self._stop)
        except BaseException:
            if self._stop.is_set():  # it failed because it was told to stop
                raise StoppedError from None
            self._stop.set()
            raise

    def _crc32c(self, placed: Placed) -> int:
        while not self._stop.is_set():
            try:
                return self._checksums[id(placed)].result(POLL_SECONDS)
            except FutureTimeout:
                continue
        raise StoppedError
