"""Differential reading: random files, valid or slightly damaged, read by this project and by the official library.

Allowed: equal values; both refuse; only we refuse. A failure is a file that we accept although the official reader
refuses it, or other values than the official reader's, unless :data:`EXCEPTIONS` states the reason.
"""

from __future__ import annotations

import importlib.util
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from campaigns import judge
from campaigns.formats import FORMATS, Format, Values
from campaigns.fuzz import FAILURES
from campaigns.mutations import damaged
from campaigns.report import Case, Report
from gptconvert.errors import GptConvertError

#: Share of the files that are damaged.
DAMAGED = 0.8


@dataclass(frozen=True)
class Exception_:
    """A difference that is intended.

    Attributes:
        format: name in :data:`FORMATS`.
        official: the official reader's error begins so, after its class; empty where both accept.
        reason: why ours is right to accept.
    """

    format: str
    official: str
    reason: str


EXCEPTIONS: tuple[Exception_, ...] = ()


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Run cases until the time is over; parameters as in :func:`campaigns.mutate.run`."""
    report, end = Report("differential", seed, next=start), time.monotonic() + seconds
    names = available()
    report.missing += [f"{name} (needs {FORMATS[name].needs})" for name in FORMATS if name not in names]
    if only is not None:
        report.add(run_case(seed, only, debug=True))
        return report
    while time.monotonic() < end:
        for case in judge.in_child(run_case, seed, report.next, end, memory=float("inf")):
            report.add(case)
    return report
