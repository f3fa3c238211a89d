"""The hidden files of a run beside its output: locked while in use, and cleaned up after runs that were killed."""

from __future__ import annotations

import os
import re
from contextlib import suppress

from gptconvert.errors import OutputError, reason, reason_and_file
from gptconvert.publish.file_system import OS, FileSystem

_LONGEST_KEY = 180


class Workspace:
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

    def clean_up(self) -> list[str]:
        """Clean up after killed runs; returns notes for the user. A file that cannot be removed does no harm.

        The caller must hold the lock, so that no other process is using the files.

        Raises:
            OutputError: an output that was set aside cannot be restored.
        """
        notes = []
        if os.path.isdir(self.aside):
            # A run was killed between the two renames: restore the old output.
            if os.path.lexists(self.output):
                notes += self._remove(self.aside)
            else:
                try:
                    self._file_system.rename(self.aside, self.output)
                except OSError as error:
                    raise self.not_restored(error) from error
        stale = re.compile(re.escape(os.path.basename(self.stem)) + r"-[0-9a-f]{6}")
        for name in os.listdir(self.parent):
            if stale.fullmatch(name):
                notes += self._remove(os.path.join(self.parent, name))
        return notes

    def recover(self) -> list[str]:
        """Lock, :meth:`clean_up` and unlock; returns notes for the user.

        Raises:
            OutputError: another process holds the lock, or an output cannot be restored.
        """
        lock, notes = self.acquire(), list[str]()
        try:
            notes += self.clean_up()
        finally:
            try:
                self._file_system.unlock(self.lock_path, lock)
            except OSError as error:
                notes.append(f"could not be removed: {self.lock_path} ({reason(error)})")
        return notes

    def not_restored(self, error: OSError) -> OutputError:
        """The error for a previous output that stays set aside."""
        return OutputError(
            f"the previous output could not be moved back ({reason(error)})",
            path=self.output,
            hint=f"it is at {self.aside}; the next run moves it back",
        )

    def _remove(self, path: str) -> list[str]:
        try:
            self._file_system.remove_tree(path)
            return []
        except OSError as error:
            return [f"an interrupted run left {path}, which could not be removed ({reason_and_file(error, path)})"]


def clean_up_after(output: str) -> list[str]:
    """Clean up after a process that died while staging ``output``; returns notes for the user."""
    notes, parent = [], os.path.dirname(output)
    while True:
        workspace = Workspace(OS, parent, output)
        if os.path.lexists(workspace.lock_path):
            try:
                notes += workspace.recover()
            except (OSError, OutputError) as error:
                notes.append(f"could not be removed: {workspace.lock_path} ({reason(error)})")
        if parent == os.path.dirname(parent):
            return notes
        parent = os.path.dirname(parent)


def _key(relative: str) -> str:
    """Encode the output's path, relative to its nearest existing parent, as one file name in UTF-8."""
    key = relative.replace("%", "%25").replace("/", "%2F")
    key = "".join(f"%{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in key)
    if len(os.fsencode(key)) <= _LONGEST_KEY:
        return key
    import hashlib

    return hashlib.sha256(os.fsencode(key)).hexdigest()[:32]


def _first_line(path: str) -> str:
    with suppress(OSError), open(path, "rb") as file:
        return file.readline(32).decode("ascii", "replace").strip() or "unknown"
    return "unknown"
