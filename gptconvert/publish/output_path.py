"""Check whether a path may become the output, without writing anything."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator

from gptconvert.errors import InputError, OutputError, os_errors_as

_NOT_A_DIRECTORY = "choose a directory that does not exist yet"


def preflight(output: str, inputs: Iterable[str] = (), force: bool = False) -> None:
    """Refuse an output that cannot be written, or that would overwrite existing files.

    Args:
        output: the directory to publish.
        inputs: files and directories that ``output`` must not replace, contain or (for directories) be inside.
        force: whether ``output`` may be a directory that contains files.

    Raises:
        OutputError: the output is refused, with the reason.
    """
    with os_errors_as(OutputError, "cannot be examined", output):
        output = os.path.abspath(output)
        for path in inputs:  # first, because other errors suggest --force, which must not be used on an input
            _check_separate(output, path)
        _check_existing(output, force)
        _check_parent(output)


def existing_ancestor(path: str) -> str:
    """``path``, or its nearest parent that exists.

    Raises:
        OSError: it cannot be determined.
    """
    while _status(path, os.lstat) is None and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def _check_existing(output: str, force: bool) -> None:
    status = _status(output, os.lstat)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a directory"
        raise OutputError(f"output exists and is {kind}", path=output, hint=_NOT_A_DIRECTORY)
    if os.path.ismount(output) or _contains(status, os.curdir):
        # A rename cannot replace a mount point, and replacing the current directory is unsafe.
        kind = "a mount point" if os.path.ismount(output) else "the current directory, or contains it"
        raise OutputError(f"output is {kind}", path=output, hint=f"choose a directory inside it: {output}/model")
    if not os.access(output, os.R_OK | os.X_OK):
        raise OutputError("output exists and cannot be read", path=output)
    if not force and os.listdir(output):
        raise OutputError(
            "output exists and is not empty", path=output, hint="choose another directory, or replace it with --force"
        )


def _check_separate(output: str, path: str) -> None:
    with os_errors_as(InputError, "cannot be read", path):
        source = _status(path)
    if source is None:
        return
    inside = stat.S_ISDIR(source.st_mode) and _contains(source, output)
    found = _status(output)
    same = found is not None and os.path.samestat(found, source)
    contains = found is not None and _contains(found, path)
    if same or inside or contains:
        relation = "is" if same else "is inside" if inside else "contains"
        raise OutputError(
            f"output {relation} the input {path}",
            path=output,
            hint="choose an output directory separate from the input",
        )


def _check_parent(output: str) -> None:
    parent = existing_ancestor(os.path.dirname(output))
    if not os.path.isdir(parent):
        raise OutputError("a parent of the output is not a directory", path=parent, hint=_NOT_A_DIRECTORY)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            "directory is not writable", path=parent, hint="choose another output, or change its permissions"
        )


def _status(path: str, stat: Callable[[str], os.stat_result] = os.stat) -> os.stat_result | None:
    """The status of a file; None if it does not exist."""
    try:
        return stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _contains(directory: os.stat_result, path: str) -> bool:
    """Whether ``path`` or one of its parents is ``directory``, compared by inode so that links do not matter."""
    return any(os.path.samestat(directory, status) for status in _ancestry(path))


def _ancestry(path: str) -> Iterator[os.stat_result]:
    """``path`` and its parents, both as given and with links resolved."""
    for current in {os.path.abspath(path), os.path.realpath(path)}:
        while True:
            status = _status(current)
            if status is not None:
                yield status
            if current == os.path.dirname(current):
                break
            current = os.path.dirname(current)
