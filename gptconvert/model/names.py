"""Tensor names with their layer numbers folded into ranges, used in listings and error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable


def collapse(names: Iterable[str]) -> list[str]:
    """Names with layer numbers folded: ``h.{0-3}.ln_1.weight``."""
    return list(grouped(names))


def grouped(names: Iterable[str], to: str = "-") -> dict[str, list[str]]:
    """Folded name → the names that it covers, in order of first appearance.

    Args:
        names: distinct names.
        to: separator between the first and the last number of a run.
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = re.search(r"(?:(?<=[./h])|(?<=layer_))[0-9]{1,9}(?=[./])", name)
        template = name if match is None else f"{name[: match.start()]}{{}}{name[match.end() :]}"
        groups.setdefault(template, []).append((-1 if match is None else int(match[0]), name))
    return {
        template if "{}" not in template else template.replace("{}", _runs(sorted(i for i, _ in found), to)): [
            name for _, name in found
        ]
        for template, found in groups.items()
    }


def _runs(numbers: list[int], to: str) -> str:
    """[0, 1, 2, 5] → ``{0-2,5}``; a single number without braces."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}{to}{b}" for a, b in runs) + "}"
