"""The error for a path that is not there, with what lies near it."""

from __future__ import annotations

import difflib
import os

from gptconvert.errors import InputError


def no_such_path(path: str) -> InputError:
    """Nothing at ``path``; the hint names entries of the deepest directory that exists, if their names are alike."""
    parent, name = os.path.split(path.rstrip("/"))
    while parent and not os.path.isdir(parent):
        parent, name = os.path.split(parent.rstrip("/"))
    try:
        near = difflib.get_close_matches(name, os.listdir(parent or "."), n=3, cutoff=0.5)
    except (OSError, ValueError):
        near = []
    meant = f"did you mean {' or '.join(os.path.join(parent, n) for n in near)}?" if near else None
    return InputError("no such file or directory", path=path, hint=meant or "or name a hub repository: org/name")
