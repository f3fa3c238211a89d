"""Whether a path may become the output: nothing here writes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator

from gptconvert.errors import OutputError

_NOT_A_DIRECTORY = "name a directory that does not exist yet"


def preflight(output: str, inputs: Iterable[str] = (), force: bool = False) -> None:
    """Refuse outputs that cannot be written, or that would harm something.

    Args:
        output: the directory to be published.
        inputs: files and directories it must not be, contain or (for directories) lie in.
        force: whether it may exist and hold something.

    Raises:
        OutputError: it is refused; the message says why.
    """
    output = os.path.abspath(output)
    for path in inputs:  # first: nobody should be told to try --force on an input
        _check_apart(output, path)
    _check_what_is_there(output, force)
    _check_parent(output)


def existing_ancestor(path: str) -> str:
    """The nearest of ``path`` and its parents that exists."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _check_what_is_there(output: str, force: bool) -> None:
    try:
        status = os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(f"cannot be looked at ({error.strerror})", path=output) from error
    if not stat.S_ISDIR(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a directory"
        raise OutputError(f"output exists and is {kind}", path=output, hint=_NOT_A_DIRECTORY)
    if os.path.ismount(output) or _contains(status, os.curdir):
        # A rename can replace neither a mount point nor, safely, the directory somebody stands in.
        kind = "a mount point" if os.path.ismount(output) else "the current directory, or holds it"
        raise OutputError(f"output is {kind}", path=output, hint=f"name a directory inside it: {output}/model")
    if not os.access(output, os.R_OK | os.X_OK):
        raise OutputError("output exists and cannot be read", path=output)
    if not force and os.listdir(output):
        raise OutputError(
            "output exists and is not empty", path=output, hint="name another directory, or replace it with --force"
        )


def _check_apart(output: str, path: str) -> None:
    if not os.path.exists(path):
        return
    source = os.stat(path)
    inside = stat.S_ISDIR(source.st_mode) and _contains(source, output)
    found = os.stat(output) if os.path.exists(output) else None
    same = found is not None and os.path.samestat(found, source)
    holds = found is not None and _contains(found, path)
    if same or inside or holds:
        how = "is" if same else "lies inside" if inside else "holds"
        raise OutputError(
            f"output {how} the input {path}", path=output, hint="name an output directory apart from the input"
        )


def _check_parent(output: str) -> None:
    parent = existing_ancestor(os.path.dirname(output))
    if not os.path.isdir(parent):
        raise OutputError("output lies below something that is not a directory", path=parent, hint=_NOT_A_DIRECTORY)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError("directory cannot be written to", path=parent, hint="choose another output, or its rights")


def _contains(directory: os.stat_result, path: str) -> bool:
    """Whether ``path`` or one of its parents is that directory; by identity, whatever the names and mounts."""
    return any(os.path.samestat(directory, status) for status in _ancestry(path))


def _ancestry(path: str) -> Iterator[os.stat_result]:
    """``path`` and its parents, by its own name and, where that leads through links, by where it really lies."""
    for way in {os.path.abspath(path), os.path.realpath(path)}:
        while True:
            if os.path.exists(way):
                yield os.stat(way)
            if way == os.path.dirname(way):
                break
            way = os.path.dirname(way)
