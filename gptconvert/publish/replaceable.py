"""What ``--force`` deletes besides the output of an earlier conversion."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

from gptconvert.publish.manifest import SUMS_FILE

#: Files that desktops write by themselves.
INCIDENTAL = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
#: The page that ``gptconvert web`` adds: its first file, and the list of all of them.
WEB_INDEX, WEB_SUMS = "index.html", f"web/{SUMS_FILE}"
#: The note names at most this many files.
MOST_NAMED = 5


def deletion_notes(output: str) -> tuple[str, ...]:
    """A note about the files in ``output`` that its SHA256SUMS does not list: replacing it deletes them."""
    found = list(islice(_unlisted(output), MOST_NAMED + 1))
    if not found:
        return ()
    names = ", ".join(found[:MOST_NAMED]) + (" …" if len(found) > MOST_NAMED else "")
    return (f"--force deletes files in the output that gptconvert did not write: {names}",)


def _unlisted(output: str) -> Iterator[str]:
    """Relative paths of files, and of links to directories, that no conversion wrote."""
    lists = (SUMS_FILE, WEB_SUMS)
    known = {*lists, *(path for name in lists for path in _listed(os.path.join(output, name)))}
    for folder, folders, names in os.walk(output):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*names, *links]):
            path = os.path.relpath(os.path.join(folder, name), output)
            if path not in known and name not in INCIDENTAL:
                yield path


def _listed(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                yield line.rstrip("\n").partition("  ")[2]
    except OSError:
        return
