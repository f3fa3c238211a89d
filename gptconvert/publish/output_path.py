"""Whether a path may become the output. Nothing here writes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator

from gptconvert.errors import OutputError

_NOT_A_DIRECTORY = "name a directory that does not exist yet"


def preflight(output: str, inputs: Iterable[str] = (), force: bool = False) -> None:
    """Refuse an output that cannot be written, or that would overwrite something.

    Args:
        output: the directory to be published.
        inputs: files and directories that it must not be, contain or (for directories) be inside.
        force: whether it may exist and contain files.

    Raises:
        OutputError: the output is refused; the message says why.
    """
    output = os.path.abspath(output)
    for path in inputs:  # first: the other errors suggest --force, which must not be used on an input
        _check_separate(output, path)
    _check_what_is_there(output, force)
    _check_parent(output)


def existing_ancestor(path: str) -> str:
    """``path``, or its nearest parent that exists."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _check_what_is_there(output: str, force: bool) -> None:
    try:
        status = os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(f"cannot be examined ({error.strerror})", path=output) from error
    if not stat.S_ISDIR(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a directory"
        raise OutputError(f"output exists and is {kind}", path=output, hint=_NOT_A_DIRECTORY)
    if os.path.ismount(output) or _contains(status, os.curdir):
        # A rename cannot replace a mount point, nor safely a process's current directory.
        kind = "a mount point" if os.path.ismount(output) else "the current directory, or contains it"
        raise OutputError(f"output is {kind}", path=output, hint=f"name a directory inside it: {output}/model")
    if not os.access(output, os.R_OK | os.X_OK):
        raise OutputError("output exists and cannot be read", path=output)
    if not force and os.listdir(output):
        raise OutputError(
            "output exists and is not empty", path=output, hint="name another directory, or replace it with --force"
        )


def _check_separate(output: str, path: str) -> None:
    if not os.path.exists(path):
        return
    source = os.stat(path)
    inside = stat.S_ISDIR(source.st_mode) and _contains(source, output)
    found = os.stat(output) if os.path.exists(output) else None
    same = found is not None and os.path.samestat(found, source)
    contains = found is not None and _contains(found, path)
    if same or inside or contains:
        relation = "is" if same else "is inside" if inside else "contains"
        raise OutputError(
            f"output {relation} the input {path}",
            path=output,
            hint="name an output directory separate from the input",
        )


def _check_parent(output: str) -> None:
    parent = existing_ancestor(os.path.dirname(output))
    if not os.path.isdir(parent):
        raise OutputError("output is below something that is not a directory", path=parent, hint=_NOT_A_DIRECTORY)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            "directory cannot be written to", path=parent, hint="name another output, or change its permissions"
        )


def _contains(directory: os.stat_result, path: str) -> bool:
    """Whether ``path`` or one of its parents is that directory, compared by inode, so that links do not matter."""
    return any(os.path.samestat(directory, status) for status in _ancestry(path))


def _ancestry(path: str) -> Iterator[os.stat_result]:
    """``path`` and its parents, as named and, if that path contains links, as resolved."""
    for current in {os.path.abspath(path), os.path.realpath(path)}:
        while True:
            if os.path.exists(current):
                yield os.stat(current)
            if current == os.path.dirname(current):
                break
            current = os.path.dirname(current)
