"""Publish a directory atomically.

Files are written to a hidden directory beside the target, synced to disk, and renamed: nothing is visible before the
rename, and everything after it. A failed or interrupted run leaves the target unchanged. What it fails to remove is
tried again when the process ends (:func:`clean_up_again`), and by the next run.
(On the need for each fsync: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.)
"""

from __future__ import annotations

import atexit
import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from gptconvert.errors import GptConvertError, OutputError, os_errors_as, reason, reason_and_file
from gptconvert.publish import journal, signals
from gptconvert.publish.file_system import OS, FileSystem
from gptconvert.publish.output_path import existing_ancestor, preflight
from gptconvert.publish.scratch import remove_abandoned
from gptconvert.publish.workspace import Workspace

#: Free space required per planned byte, with room for directories, block rounding and file-system metadata.
SPACE_FACTOR = 1.02
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
        self._given = os.fspath(output)
        self.notes: list[str] = []
        self._inputs, self._force = tuple(inputs), force
        self._file_system = file_system
        with os_errors_as(OutputError, "cannot be examined", self._given):
            self.output = os.path.abspath(self._given)
            preflight(self._given, self._inputs, force)
            self._workspace = Workspace(file_system, existing_ancestor(os.path.dirname(self.output)), self.output)
        self.path = f"{self._workspace.stem}-{secrets.token_hex(3)}"
        self._lock: int | None = None
        self._left_lock, self._staged, self._replaced = False, False, ""
        self._made_parents: list[str] = []
        self._published = False

    def require_space(self, nbytes: int) -> None:
        """Check that ``nbytes`` will fit.

        Raises:
            OutputError: not enough free space.
        """
        needed = int(nbytes * SPACE_FACTOR)
        with os_errors_as(OutputError, "free space cannot be determined", self._given):
            free = self._file_system.free_bytes(self._workspace.parent)
        if free < needed:
            raise OutputError(
                "not enough free space",
                path=self._given,
                expected=f"{needed} bytes",
                found=f"{free} bytes",
                hint="free some space, or choose an output on another file system",
            )

    def __enter__(self) -> Self:
        try:
            with signals.held(), self._errors("cannot be prepared"):
                _unfinished.append(self)
                journal.record("staging", self.output)
                self._clean_up_ancestors()
                self._acquire()
                self.notes += self._workspace.clean_up()
                remove_abandoned()
                preflight(self._given, self._inputs, self._force)
                self._staged = True
                self._file_system.make_directory(self.path)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with signals.held():
            problems = self.discard()
            if isinstance(error, GptConvertError):
                self._show_as_given(error)
            for problem in problems:
                if error is None:
                    self.notes.append(f"could not be removed: {problem}")
                else:
                    error.add_note(f"could not be removed: {problem}")

    def publish(self) -> None:
        """Sync everything to disk and move it to the target.

        Raises:
            OutputError: publishing failed. The target is unchanged unless the message says otherwise.
            Interrupted: a signal was raised earlier and swallowed. Nothing is published.
        """
        with self._errors("cannot be published"):
            _sync_tree(self._file_system, self.path)
            with signals.held():
                signals.check()
                self._make_parents()
                try:
                    self._replaced = self._swap()
                except _NotUndoneError as error:
                    self._replaced = error.replaced
                    self._set_published()
                    raise OutputError(
                        f"is published, but could not be synced to disk ({reason(error)})",
                        path=self._given,
                        hint="check the disk; a power failure may damage the output",
                    ) from error
                self._set_published()

    def _set_published(self) -> None:
        self._published = True
        journal.record("published", self._given)

    def _acquire(self) -> None:
        try:
            self._lock = self._workspace.acquire()
        except OSError:
            self._left_lock = True  # perhaps
            raise

    def _clean_up_ancestors(self) -> None:
        """Clean up after killed runs that staged further up the tree, because the parents did not exist yet."""
        above = self._workspace.parent
        while above != os.path.dirname(above):
            above = os.path.dirname(above)
            workspace = Workspace(self._file_system, above, self.output)
            if os.path.lexists(workspace.lock_path):
                self.notes += workspace.recover()

    def _make_parents(self) -> None:
        missing, parent = [], os.path.dirname(self.output)
        existing = existing_ancestor(parent)
        while parent != existing:
            missing.append(parent)
            parent = os.path.dirname(parent)
        for directory in reversed(missing):
            try:
                self._file_system.make_directory(directory)
                self._made_parents.append(directory)
            except FileExistsError:  # another run made it in the meantime, and removes it if that run fails
                if not os.path.isdir(directory):
                    raise
            self._file_system.sync_path(os.path.dirname(directory))

    def _swap(self) -> str:
        """Move the staged directory to the target; returns the new path of the directory it replaced, or ""."""
        if not (self._force and _is_directory(self.output) and os.listdir(self.output)):
            _move_or_undo(self._file_system.rename, self.path, self.output, self._sync_parents)
            return ""
        try:
            _move_or_undo(self._file_system.exchange, self.path, self.output, self._sync_parents, self.path)
            return self.path
        except _NotUndoneError:
            raise
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise
        aside = self._workspace.aside
        self._file_system.rename(self.output, aside)
        try:
            _move_or_undo(self._file_system.rename, self.path, self.output, self._sync_parents, aside)
        except _NotUndoneError:
            raise
        except BaseException as error:
            try:
                self._file_system.rename(aside, self.output)
            except OSError as problem:
                raise self._workspace.not_restored(problem) from error
            raise
        return aside

    def _sync_parents(self) -> None:
        for directory in {os.path.dirname(self.output), self._workspace.parent}:
            self._file_system.sync_path(directory)

    def discard(self) -> list[str]:
        """Remove everything except the published output, the lock last; returns what could not be removed and why.

        May be called again to retry.
        """
        problems = []
        steps = (
            (self._remove_replaced, self._replaced),
            (self._remove_staged, self.path),
            (self._remove_parents, os.path.dirname(self.output)),
            (self._release, self._workspace.lock_path),
        )
        for step, path in steps:
            try:
                step()
            except FileNotFoundError:
                pass  # removed by the user, or by a later run
            except OSError as problem:
                problems.append(f"{path} ({reason_and_file(problem, path)})")
        if not problems:
            if self in _unfinished:
                _unfinished.remove(self)
            journal.record("ended", self.output)
        return problems

    def _remove_replaced(self) -> None:
        if self._replaced:
            self._file_system.remove_tree(self._replaced)
        self._replaced = ""

    def _remove_staged(self) -> None:
        if self._staged and not self._published:
            self._file_system.remove_tree(self.path)
        self._staged = False

    def _remove_parents(self) -> None:
        while self._made_parents and not self._published:
            try:
                self._file_system.remove_directory(self._made_parents[-1])
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self._made_parents.clear()  # another run has published in it
                return
            self._made_parents.pop()

    def _release(self) -> None:
        lock_path = self._workspace.lock_path
        if self._left_lock:
            os.lstat(lock_path)
            self._lock = self._file_system.lock(lock_path)  # None: another run removes it
        if self._lock is not None:
            descriptor, self._lock, self._left_lock = self._lock, None, True
            self._file_system.unlock(lock_path, descriptor)
        self._left_lock = False

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Convert :class:`OSError` to :class:`OutputError`, with the path that the user gave."""
        try:
            with os_errors_as(OutputError, what, self._given):
                yield
        except GptConvertError as error:
            self._show_as_given(error)
            raise

    def _show_as_given(self, error: GptConvertError) -> None:
        """Replace the paths of the staging directory and of the output, which the user did not give."""
        for hidden in (self.path, self.output):
            error.message = error.message.replace(hidden, self._given)
            if error.path is not None and (error.path + os.sep).startswith(hidden + os.sep):
                error.path = self._given + error.path[len(hidden) :]


#: The staging directories that exist, or may exist because they could not be removed.
_unfinished: list[Staging] = []


def clean_up_again() -> list[str]:
    """Retry to remove what could not be removed; returns what still cannot, and why."""
    with signals.held():
        return [problem for staging in list(_unfinished) for problem in staging.discard()]


atexit.register(clean_up_again)


class _NotUndoneError(OSError):
    """A move that was neither confirmed nor undone: the new output is in place.

    Attributes:
        replaced: new path of the directory it replaced, or "".
    """

    replaced = ""


def _move_or_undo(
    move: Callable[[str, str], None], source: str, target: str, confirm: Callable[[], None], replaced: str = ""
) -> None:
    """Call ``move``, then ``confirm``; if ``confirm`` fails, move back.

    Raises:
        _NotUndoneError: moving back failed too.
    """
    move(source, target)
    try:
        confirm()
    except BaseException as error:
        try:
            move(target, source)
        except OSError as problem:
            failed = _NotUndoneError(problem.errno, problem.strerror)
            failed.replaced = replaced
            raise failed from error
        raise


def _is_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _sync_tree(file_system: FileSystem, root: str) -> None:
    """Sync every file and directory in ``root`` to disk, the root last. Syncing a file again costs nothing."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            file_system.sync_path(os.path.join(directory, name))
        file_system.sync_path(directory)
