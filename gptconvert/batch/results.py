"""The result of each job, and of the whole batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gptconvert.batch.jobs import Entry
from gptconvert.errors import GptConvertError, InputError, OutputError, UnsafeInputError, UnsupportedError, UsageError
from gptconvert.errors import VerificationError as Verification
from gptconvert.model.schema import SCHEMA_VERSION

Status = Literal["converted", "skipped", "failed"]

#: Exit codes, the worst first. None: codes that are not listed, such as 137 of a process that was killed.
SEVERITY = (
    Verification.exit_code,
    UnsafeInputError.exit_code,
    1,
    None,
    InputError.exit_code,
    UnsupportedError.exit_code,
    OutputError.exit_code,
    UsageError.exit_code,
)
#: Exit codes that repeat when the job does.
PERMANENT = (UsageError.exit_code, UnsupportedError.exit_code, Verification.exit_code, UnsafeInputError.exit_code)


@dataclass(frozen=True)
class Record:
    """The result of one job: a line of the output.

    Attributes:
        status: ``converted``, ``skipped`` because the output is up to date, or ``failed``.
        line: of the list of jobs.
        source: as written in the list; None if missing.
        output: as written in the list; None if missing.
        exit_code: of the job; 0 unless it failed.
        error: the fields of the error; None unless it failed.
        seconds: wall time of the last attempt.
        attempts: how often it was started.
        worker: the Dask worker that ran it.
        details: what the job itself reports: model, size, verification, digest of the manifest, notes.
    """

    status: Status
    line: int = 0
    source: str | None = None
    output: str | None = None
    exit_code: int = 0
    error: Mapping[str, Any] | None = None
    seconds: float = 0.0
    attempts: int = 0
    worker: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def of(self, entry: Entry) -> Record:
        """This result, with the line, source and output of its entry."""
        return replace(self, line=entry.line, source=entry.source, output=entry.output)

    def as_dict(self) -> dict[str, object]:
        """Plain values."""
        return {
            "line": self.line,
            "source": self.source,
            "output": self.output,
            "ok": self.status != "failed",
            "status": self.status,
            "exit_code": self.exit_code,
            "error": None if self.error is None else dict(self.error),
            "seconds": round(self.seconds, 2),
            "attempts": self.attempts,
            "worker": self.worker,
            **DETAILS,
            **self.details,
        }

    def as_json(self) -> str:
        """A line of JSON Lines."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **self.as_dict()})

    @property
    def is_transient(self) -> bool:
        """Whether another attempt may succeed: a killed process, a full disk, a network that fails."""
        return self.exit_code != 0 and self.exit_code not in PERMANENT


#: What a job reports besides its status, with the values of a job that failed.
DETAILS: Mapping[str, Any] = {
    "family": None,
    "task": None,
    "verified": None,
    "size": None,
    "manifest_sha256": None,
    "notes": [],
}


def failure(error: GptConvertError, code: int | None = None, **fields: Any) -> Record:
    """The result of a job that failed with ``error``."""
    code = error.exit_code if code is None else code
    return Record("failed", exit_code=code, error={**error.as_dict(), "exit_code": code}, **fields)


def worst(codes: Iterable[int]) -> int:
    """The exit code of a batch: the worst of its jobs' codes."""
    other = SEVERITY.index(None)

    def rank(code: int) -> tuple[int, int]:
        return SEVERITY.index(code) if code in SEVERITY else other, code

    return min(filter(None, codes), key=rank, default=0)


def summary(records: Sequence[Record], seconds: float, left: int = 0) -> str:
    """One sentence: how many jobs ended how. ``left`` did not run to their end."""
    counts = Counter(record.status for record in records)
    parts = [f"{counts[status]} {status}" for status in ("converted", "skipped", "failed") if counts[status]]
    parts += [f"{left} not finished"] * bool(left)
    return f"{', '.join(parts) or 'nothing to do'}, in {seconds:.1f} s"


def rows(records: Iterable[Record]) -> list[tuple[str, ...]]:
    """The table of a batch, by line."""
    named: list[tuple[str, ...]] = [("line", "status", "seconds", "output", "")]
    for record in sorted(records, key=lambda record: record.line):
        reason = "" if record.error is None else str(record.error["message"]).splitlines()[0]
        prefix = f"line {record.line}: "
        shown = f"exit {record.exit_code}: {reason.removeprefix(prefix)}" if reason else ""
        named.append((str(record.line), record.status, f"{record.seconds:.1f}", record.output or "–", shown))
    return named
