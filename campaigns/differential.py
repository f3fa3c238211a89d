"""Differential reading: random files, valid or slightly damaged, read by this project and by the official library.

Allowed: equal values, and our refusal of a damaged file. Failures: we refuse a file as the official library wrote it;
we accept what the official reader refuses; or the values differ. :data:`EXCEPTIONS` lists what is intended, and why.
"""

from __future__ import annotations

import importlib.util
import mmap
import random
import re
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from campaigns import judge
from campaigns.formats import FORMATS, Format, Values
from campaigns.fuzz import kept
from campaigns.mutations import damaged
from campaigns.report import Case, Report

#: Share of the files that are damaged.
DAMAGED = 0.8


@dataclass(frozen=True)
class Intended:
    """A difference that is intended.

    Attributes:
        format: name in :data:`~campaigns.formats.FORMATS`.
        finding: a regular expression for what the outcome begins with.
        reason: why ours is right.
    """

    format: str
    finding: str
    reason: str


EXCEPTIONS = (
    Intended(
        "saved_model",
        "official refuses: DecodeError",
        "the check reads only what can run; TensorFlow refuses the rest in a confined process",
    ),
    Intended(
        "torch",
        "official refuses: UnpicklingError: .*Unsupported operand",
        "our interpreter knows more opcodes than torch.load's; none of them can run code",
    ),
    Intended(
        "torch",
        r"official refuses: RuntimeError: \[enforce fail at inline_container.cc:\d+\] . "
        "(Couldn't parse the version|Attempted to read a PyTorch file with version)",
        "records without tensors are not read",
    ),
)

#: Shared with the child processes: 1 while the official library reads.
_OFFICIAL = mmap.mmap(-1, 1)


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Run cases until the time is over; parameters as in :func:`campaigns.mutate.run`."""
    report, end = Report("differential", seed, next=start), time.monotonic() + seconds
    names = available()
    report.missing += [f"{name} (needs {FORMATS[name].needs})" for name in FORMATS if name not in names]
    if only is not None:
        report.add(run_case(seed, only, debug=True))
        return report
    while time.monotonic() < end:
        _OFFICIAL[0] = 0
        # No limit on memory: most of it is the official libraries'.
        for case in judge.in_child(run_case, seed, report.next, end, memory=float("inf")):
            crashed = _OFFICIAL[0] and case.outcome.startswith(("killed", "hangs"))
            report.add(replace(case, outcome="official crashes", failed=False) if crashed else case)
    return report


def available() -> list[str]:
    """The formats whose libraries are installed."""
    return [name for name, f in FORMATS.items() if f.needs is None or importlib.util.find_spec(f.needs)]


def run_case(seed: int, number: int, *, debug: bool = False) -> Case:
    """Make a file, damage it perhaps, and read it twice."""
    dice = random.Random(f"differential:{seed}:{number}")
    name = dice.choice(available())
    format, what = FORMATS[name], name
    files, valid = format.make(dice), dice.random() >= DAMAGED
    if not valid:
        chosen = dice.choice(sorted(files))
        change = format.mutation if dice.random() < 0.6 else damaged
        files[chosen] = change(dice, files[chosen])
        what = f"{name}, {chosen}: {change.__name__}"
    with tempfile.TemporaryDirectory(dir=judge.MEMORY_FOLDER) as folder:
        for file, data in files.items():
            (Path(folder) / file).write_bytes(data)
        outcome, seconds = compare(
            format, str(Path(folder) / format.path), valid=valid and format.accepted, debug=debug
        )
    outcome = intended(name, outcome)[:300]
    failed = not outcome.startswith(ALLOWED)
    what += f" {[kept(f'{name}-{file}', data) for file, data in files.items()]}" if failed else ""
    return Case(number, what, outcome, seconds, failed)


#: What the outcomes that are not failures begin with.
ALLOWED = ("equal", "refused", "intended", "official crashes")


def compare(format: Format, path: str, *, valid: bool, debug: bool = False) -> tuple[str, float]:
    """Read a file twice; the outcome, and our processor time."""
    ours: list[Values] = []
    started = time.process_time()
    outcome = judge.outcome_of(lambda: ours.append(format.ours(path)), debug=debug)
    seconds = time.process_time() - started
    if seconds > judge.MAX_SECONDS:
        return f"slow: {seconds:.1f} s", seconds
    if not ours:
        refusal = f"a valid file is refused: {outcome}" if valid else "refused"
        return refusal if judge.is_allowed(outcome) else outcome, seconds
    try:
        with _official():
            official = format.official(path)
    except BaseException as error:  # Rust libraries raise panics that are not Exceptions
        if isinstance(error, KeyboardInterrupt):
            raise
        if debug:
            traceback.print_exc()
        return f"official refuses: {type(error).__name__}: {error}", seconds
    return difference(ours[0], official), seconds


@contextmanager
def _official() -> Iterator[None]:
    _OFFICIAL[0] = 1
    try:
        yield
    finally:
        _OFFICIAL[0] = 0


def difference(ours: Values, official: Values) -> str:
    """``equal``, or the first difference."""
    for name in (*ours, *official):
        if name not in official or name not in ours:
            return f"values differ: {name!r} is only in {'ours' if name in ours else 'the official reading'}"
        if ours[name] != official[name]:
            return f"values differ: {name!r}: {ours[name]!s:.100} and {official[name]!s:.100}"
    return "equal"


def intended(name: str, outcome: str) -> str:
    """The outcome, or the reason that it is allowed."""
    for exception in EXCEPTIONS:
        if exception.format == name and re.match(exception.finding, outcome, re.DOTALL):
            return f"intended: {exception.reason}"
    return outcome
