"""Files whose bytes are not known when they are planned: built in a thread of their own while others are written."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from types import TracebackType
from typing import Self

import google_crc32c

from gptconvert.errors import InputError, OutputError
from gptconvert.publish.source_reader import SourceReader, StoppedError
from gptconvert.targets.plan import Placed, PlannedFile
from gptconvert.tensors import Segment, Stored

#: How often a thread that waits looks whether it should stop.
POLL_SECONDS = 0.1


class Finishing:
    """Calls :attr:`PlannedFile.finish` of every file that has one, in plan order, from the start of the writing on.

    A context manager: leaving it by an exception ends the thread.

    Args:
        directory: where the files are written.
        files: all planned files.
        stop: set by whoever fails first, here or elsewhere; then the thread ends.
    """

    def __init__(self, directory: str, files: Iterable[PlannedFile], stop: threading.Event) -> None:
        files = list(files)
        self._directory, self._stop = directory, stop
        self._holding = {id(placed): file.path for file in files for placed in file.tensors}
        self._written = {file.path: threading.Event() for file in files}
        self._pool = ThreadPoolExecutor(1)
        unfinished = [file for file in files if file.finish is not None]
        self._finished = [self._pool.submit(self._finish, file) for file in unfinished]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        if isinstance(error, StoppedError):
            for reason in map(_reason, self._finished):
                if reason is not None:
                    raise reason from None

    def wrote(self, file: PlannedFile) -> None:
        """``file`` has all its bytes."""
        self._written[file.path].set()

    def files(self) -> Iterator[PlannedFile]:
        """The finished files in plan order, with their bytes and real sizes, each as soon as it is known.

        Raises:
            StoppedError: another thread failed.
            Exception: whatever ``finish`` raised.
        """
        for finished in self._finished:
            while not wait([finished], POLL_SECONDS).done:
                self._check()
            yield finished.result()

    def _finish(self, file: PlannedFile) -> PlannedFile:
        try:
            self._check()
            content = file.finish(self._crc32c, self._stop)  # type: ignore[misc]  # only such files come here
        except BaseException:
            if self._stop.is_set():  # it failed because it was told to stop
                raise StoppedError from None
            self._stop.set()
            raise
        return replace(file, nbytes=len(content), head=content, finish=None)

    def _crc32c(self, placed: Placed) -> int:
        """What ``finish`` asks with: of the written bytes, once the file that holds them is complete."""
        path, tensor, value = self._holding[id(placed)], placed.tensor, 0
        while not self._written[path].wait(POLL_SECONDS):
            self._check()
        if isinstance(tensor, Stored) and tensor.dtype.isnative and tensor.crc32c is not None:
            return tensor.crc32c  # compared with the source's bytes by digest_tensors
        segment = Segment(os.path.join(self._directory, path), placed.offset, tensor.nbytes)
        try:
            with SourceReader(self._stop) as reader:
                for block in reader.blocks((segment,)):
                    value = google_crc32c.extend(value, block)
        except InputError as error:
            raise OutputError(f"cannot be read back ({error.message})", path=error.path) from error
        return value

    def _check(self) -> None:
        if self._stop.is_set():
            raise StoppedError


def _reason(finished: Future[PlannedFile]) -> BaseException | None:
    """Why a file was not finished, if it was its own fault."""
    error = finished.exception() if finished.done() and not finished.cancelled() else None
    return None if isinstance(error, StoppedError) else error
