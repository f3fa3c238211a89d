"""Publish a directory whole or not at all.

Everything is written into a hidden directory beside the target, forced to disk, and renamed: before the rename
nobody sees anything, after it everybody sees everything. A failed or interrupted run leaves the target as it was.
(Why each fsync: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.)
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from gptconvert.errors import OutputError
from gptconvert.publish import fileops, signals
from gptconvert.publish.output_path import existing_ancestor, preflight

#: Free space asked for, relative to the bytes planned: directories, block rounding and the file system's own needs.
SPACE_FACTOR = 1.02
_LONGEST_KEY = 180
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


class Staging:
    """A directory to write into, which takes the target's place on :meth:`publish`.

    Use as a context manager: leaving it without having published, for whatever reason, removes what was written
    and leaves the target untouched. One process at a time works on one target.

    Args:
        output: the directory to publish. Missing parents are made when publishing.
        inputs: files and directories the output must not replace, contain or lie in.
        force: whether a directory at ``output`` may be replaced.

    Attributes:
        path: the directory to write into; exists inside the ``with`` block.
        notes: what the user should know afterwards (one sentence each).

    Raises:
        OutputError: the output is refused, locked, or cannot be made; on construction, before anything is written,
            wherever that can be known.
    """

    def __init__(self, output: str | os.PathLike[str], *, inputs: Iterable[str] = (), force: bool = False) -> None:
        self.output = os.path.abspath(os.fspath(output))
        self.notes: list[str] = []
        self._inputs, self._force = tuple(inputs), force
        preflight(self.output, self._inputs, force)
        self._site = _Site(existing_ancestor(os.path.dirname(self.output)), self.output)
        self.path = f"{self._site.stem}-{secrets.token_hex(3)}"
        self._lock: int | None = None
        self._made_parents: list[str] = []
        self._published = False

    def require_space(self, nbytes: int) -> None:
        """Refuse to begin if ``nbytes`` will not fit.

        Raises:
            OutputError: too little is free.
        """
        space = os.statvfs(self._site.parent)
        free, needed = space.f_bavail * space.f_frsize, int(nbytes * SPACE_FACTOR)
        if free < needed:
            raise OutputError(
                "not enough free space",
                path=self.output,
                expected=f"{needed} bytes",
                found=f"{free} bytes",
                hint="free some space, or name an output on another file system",
            )

    def __enter__(self) -> Self:
        try:
            with signals.held(), _as_output_error(self.output, "cannot be prepared"):
                self._clean_up_above()
                self._lock = self._site.acquire()
                self._site.clean_up()
                preflight(self.output, self._inputs, self._force)
                fileops.make_directory(self.path)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with signals.held():
            self._discard(error)

    def publish(self) -> None:
        """Force everything to disk and put it in the target's place.

        Raises:
            OutputError: it could not be done; the target is as it was.
        """
        with _as_output_error(self.output, "cannot be published"):
            _sync_tree(self.path)
            with signals.held():
                self._make_parents()
                replaced = self._swap()
                self._published = True
            if replaced is not None:
                self._remove_replaced(replaced)

    def _clean_up_above(self) -> None:
        """A killed run may have worked further up, if the parents did not exist then."""
        above = self._site.parent
        while above != os.path.dirname(above):
            above = os.path.dirname(above)
            site = _Site(above, self.output)
            if os.path.lexists(site.lock_path):
                lock = site.acquire()
                try:
                    site.clean_up()
                finally:
                    fileops.unlock(site.lock_path, lock)

    def _make_parents(self) -> None:
        missing, parent = [], os.path.dirname(self.output)
        while not os.path.lexists(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        for directory in reversed(missing):
            fileops.make_directory(directory)
            self._made_parents.append(directory)
            fileops.sync_path(os.path.dirname(directory))

    def _swap(self) -> str | None:
        """Put the staged directory in place; returns where the directory it replaced now is, if it replaced one."""
        if not (self._force and _is_directory(self.output) and os.listdir(self.output)):
            _undoable(fileops.rename, self.path, self.output, self._sync_parents)
            return None
        try:
            _undoable(fileops.exchange, self.path, self.output, self._sync_parents)
            return self.path
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise
        fileops.rename(self.output, self._site.aside)
        try:
            _undoable(fileops.rename, self.path, self.output, self._sync_parents)
        except BaseException:
            fileops.rename(self._site.aside, self.output)
            raise
        return self._site.aside

    def _sync_parents(self) -> None:
        for directory in {os.path.dirname(self.output), self._site.parent}:
            fileops.sync_path(directory)

    def _remove_replaced(self, path: str) -> None:
        try:
            fileops.remove_tree(path)
        except OSError as error:
            self.notes.append(f"the replaced output could not be removed ({error.strerror}): {path}")

    def _discard(self, error: BaseException | None) -> None:
        """Remove whatever is not published, and the lock last. Must not hide the error that led here."""
        for step in (self._remove_staged, self._remove_parents, self._release):
            try:
                step()
            except OSError as problem:
                if error is not None:
                    error.add_note(f"cleaning up after this failed too: {problem}")

    def _remove_staged(self) -> None:
        if not self._published and self._lock is not None and os.path.isdir(self.path):
            fileops.remove_tree(self.path)

    def _remove_parents(self) -> None:
        while self._made_parents and not self._published:
            fileops.remove_directory(self._made_parents.pop())

    def _release(self) -> None:
        if self._lock is not None:
            descriptor, self._lock = self._lock, None
            fileops.unlock(self._site.lock_path, descriptor)


class _Site:
    """The hidden names beside which an output is made, in ``parent``, the nearest directory that exists.

    Attributes:
        stem: what all of them begin with.
        lock_path: held by the process at work.
        aside: where a replaced output lies for a moment, on systems without an atomic exchange.
    """

    def __init__(self, parent: str, output: str) -> None:
        self.parent, self.output = parent, output
        self.stem = os.path.join(parent, f".{_key(os.path.relpath(output, parent))}.gptconvert")
        self.lock_path, self.aside = f"{self.stem}.lock", f"{self.stem}-replaced"

    def acquire(self) -> int:
        """The descriptor that holds the lock.

        Raises:
            OutputError: another process holds it.
        """
        lock = fileops.lock(self.lock_path)
        if lock is None:
            raise OutputError(
                f"locked by pid {_first_line(self.lock_path)}",
                path=self.output,
                hint="another run is writing this output; wait for it, or name another output",
            )
        return lock

    def clean_up(self) -> None:
        """Undo what killed runs left. We hold the lock, so nobody is at work in any of it."""
        if os.path.isdir(self.aside):
            # Killed between two renames: the old output must come back.
            if os.path.lexists(self.output):
                fileops.remove_tree(self.aside)
            else:
                fileops.rename(self.aside, self.output)
        stale = re.compile(re.escape(os.path.basename(self.stem)) + r"-[0-9a-f]{6}")
        for name in os.listdir(self.parent):
            if stale.fullmatch(name):
                fileops.remove_tree(os.path.join(self.parent, name))


def _undoable(move: Callable[[str, str], None], source: str, target: str, confirm: Callable[[], None]) -> None:
    """``move``, then ``confirm``; if confirming fails, move back."""
    move(source, target)
    try:
        confirm()
    except BaseException:
        move(target, source)
        raise


def _key(relative: str) -> str:
    """The output's path below the directory that exists, as one file name."""
    key = relative.replace("%", "%25").replace("/", "%2F")
    if len(os.fsencode(key)) <= _LONGEST_KEY:
        return key
    import hashlib

    return hashlib.sha256(os.fsencode(key)).hexdigest()[:32]


def _is_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _first_line(path: str) -> str:
    with suppress(OSError), open(path, "rb") as file:
        return file.readline(32).decode("ascii", "replace").strip() or "unknown"
    return "unknown"


def _sync_tree(root: str) -> None:
    """Every file and directory in ``root``, the root last. Files already on disk cost nothing."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            fileops.sync_path(os.path.join(directory, name))
        fileops.sync_path(directory)


@contextmanager
def _as_output_error(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{what} ({error.strerror})", path=path) from error
