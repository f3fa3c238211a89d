"""Publish a directory atomically.

Files are written to a hidden directory beside the target, synced to disk, and renamed: nothing is visible before the
rename, and everything after it. A failed or interrupted run leaves the target unchanged.
(On the need for each fsync: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.)
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
from gptconvert.publish import signals
from gptconvert.publish.file_system import OS, FileSystem
from gptconvert.publish.output_path import existing_ancestor, preflight

#: Free space required per planned byte, with room for directories, block rounding and file-system metadata.
SPACE_FACTOR = 1.02
_LONGEST_KEY = 180
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


class Staging:
    """A staging directory, which :meth:`publish` moves to the target.

    Use it as a context manager: leaving it without publishing removes the staged files and leaves the target
    untouched. A lock allows one process at a time per target.

    Args:
        output: the directory to publish. Missing parents are created when publishing.
        inputs: files and directories that the output must not replace, contain or be inside.
        force: whether a directory at ``output`` may be replaced.
        file_system: the file operations.

    Attributes:
        path: the staging directory; exists inside the ``with`` block.
        notes: for the user, one sentence each.

    Raises:
        OutputError: the output is refused, locked, or cannot be created. Raised on construction where possible.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        inputs: Iterable[str] = (),
        force: bool = False,
        file_system: FileSystem = OS,
    ) -> None:
        self.output = os.path.abspath(os.fspath(output))
        self.notes: list[str] = []
        self._inputs, self._force = tuple(inputs), force
        self._file_system = file_system
        preflight(self.output, self._inputs, force)
        self._workspace = _Workspace(file_system, existing_ancestor(os.path.dirname(self.output)), self.output)
        self.path = f"{self._workspace.stem}-{secrets.token_hex(3)}"
        self._lock: int | None = None
        self._made_parents: list[str] = []
        self._published = False

    def require_space(self, nbytes: int) -> None:
        """Check that ``nbytes`` will fit.

        Raises:
            OutputError: not enough free space.
        """
        free, needed = self._file_system.free_bytes(self._workspace.parent), int(nbytes * SPACE_FACTOR)
        if free < needed:
            raise OutputError(
                "not enough free space",
                path=self.output,
                expected=f"{needed} bytes",
                found=f"{free} bytes",
                hint="free some space, or choose an output on another file system",
            )

    def __enter__(self) -> Self:
        try:
            with signals.held(), _as_output_error(self.output, "cannot be prepared"):
                self._clean_up_ancestors()
                self._lock = self._workspace.acquire()
                self._workspace.clean_up()
                preflight(self.output, self._inputs, self._force)
                self._file_system.make_directory(self.path)
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
        """Sync everything to disk and move it to the target.

        Raises:
            OutputError: publishing failed; the target is unchanged.
        """
        with _as_output_error(self.output, "cannot be published"):
            _sync_tree(self._file_system, self.path)
            with signals.held():
                self._make_parents()
                replaced = self._swap()
                self._published = True
            if replaced is not None:
                self._remove_replaced(replaced)

    def _clean_up_ancestors(self) -> None:
        """Clean up after killed runs that staged further up the tree, because the parents did not exist yet."""
        above = self._workspace.parent
        while above != os.path.dirname(above):
            above = os.path.dirname(above)
            workspace = _Workspace(self._file_system, above, self.output)
            if os.path.lexists(workspace.lock_path):
                lock = workspace.acquire()
                try:
                    workspace.clean_up()
                finally:
                    self._file_system.unlock(workspace.lock_path, lock)

    def _make_parents(self) -> None:
        missing, parent = [], os.path.dirname(self.output)
        while not os.path.lexists(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        for directory in reversed(missing):
            self._file_system.make_directory(directory)
            self._made_parents.append(directory)
            self._file_system.sync_path(os.path.dirname(directory))

    def _swap(self) -> str | None:
        """Move the staged directory to the target; returns the new path of the directory it replaced, if any."""
        if not (self._force and _is_directory(self.output) and os.listdir(self.output)):
            _move_or_undo(self._file_system.rename, self.path, self.output, self._sync_parents)
            return None
        try:
            _move_or_undo(self._file_system.exchange, self.path, self.output, self._sync_parents)
            return self.path
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise
        self._file_system.rename(self.output, self._workspace.aside)
        try:
            _move_or_undo(self._file_system.rename, self.path, self.output, self._sync_parents)
        except BaseException:
            self._file_system.rename(self._workspace.aside, self.output)
            raise
        return self._workspace.aside

    def _sync_parents(self) -> None:
        for directory in {os.path.dirname(self.output), self._workspace.parent}:
            self._file_system.sync_path(directory)

    def _remove_replaced(self, path: str) -> None:
        try:
            self._file_system.remove_tree(path)
        except OSError as error:
            self.notes.append(f"the replaced output could not be removed ({error.strerror}): {path}")

    def _discard(self, error: BaseException | None) -> None:
        """Remove everything not published, the lock last, without masking ``error``, which ended the context."""
        for step in (self._remove_staged, self._remove_parents, self._release):
            try:
                step()
            except OSError as problem:
                if error is not None:
                    error.add_note(f"the cleanup after this error failed too: {problem}")

    def _remove_staged(self) -> None:
        if not self._published and self._lock is not None and os.path.isdir(self.path):
            self._file_system.remove_tree(self.path)

    def _remove_parents(self) -> None:
        while self._made_parents and not self._published:
            self._file_system.remove_directory(self._made_parents.pop())

    def _release(self) -> None:
        if self._lock is not None:
            descriptor, self._lock = self._lock, None
            self._file_system.unlock(self._workspace.lock_path, descriptor)


class _Workspace:
    """The hidden files and directories of one output, in its nearest existing parent directory ``parent``.

    Attributes:
        stem: common prefix of their paths.
        lock_path: the lock file.
        aside: temporary path of a replaced output, on systems without an atomic exchange.
    """

    def __init__(self, file_system: FileSystem, parent: str, output: str) -> None:
        self._file_system, self.parent, self.output = file_system, parent, output
        self.stem = os.path.join(parent, f".{_key(os.path.relpath(output, parent))}.gptconvert")
        self.lock_path, self.aside = f"{self.stem}.lock", f"{self.stem}-replaced"

    def acquire(self) -> int:
        """Lock the output; returns the descriptor that holds the lock.

        Raises:
            OutputError: another process holds it.
        """
        lock = self._file_system.lock(self.lock_path)
        if lock is None:
            raise OutputError(
                f"locked by pid {_first_line(self.lock_path)}",
                path=self.output,
                hint="another run is writing this output; wait for it, or choose another output",
            )
        return lock

    def clean_up(self) -> None:
        """Clean up after killed runs. The caller must hold the lock, so that no other process is using the files."""
        if os.path.isdir(self.aside):
            # A run was killed between the two renames: restore the old output.
            if os.path.lexists(self.output):
                self._file_system.remove_tree(self.aside)
            else:
                self._file_system.rename(self.aside, self.output)
        stale = re.compile(re.escape(os.path.basename(self.stem)) + r"-[0-9a-f]{6}")
        for name in os.listdir(self.parent):
            if stale.fullmatch(name):
                self._file_system.remove_tree(os.path.join(self.parent, name))


def _move_or_undo(move: Callable[[str, str], None], source: str, target: str, confirm: Callable[[], None]) -> None:
    """Call ``move``, then ``confirm``; if ``confirm`` fails, move back."""
    move(source, target)
    try:
        confirm()
    except BaseException:
        move(target, source)
        raise


def _key(relative: str) -> str:
    """Encode the output's path, relative to its nearest existing parent, as one file name."""
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


def _sync_tree(file_system: FileSystem, root: str) -> None:
    """Sync every file and directory in ``root`` to disk, the root last. Syncing a file again costs nothing."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            file_system.sync_path(os.path.join(directory, name))
        file_system.sync_path(directory)


@contextmanager
def _as_output_error(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{what} ({error.strerror})", path=path) from error
