"""The result of a campaign."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


class NotRunError(Exception):
    """Raised by a campaign that needs something missing; the message names it."""


@dataclass(frozen=True)
class Case:
    """One case and its outcome.

    Attributes:
        number: identifies it within the campaign's seed.
        what: the input, as text.
        outcome: ``ok``, ``exit 3`` and so on, or what went wrong.
        seconds: processor time.
        failed: whether the outcome is not allowed.
        inputs: number of inputs tried.
    """

    number: int
    what: str
    outcome: str
    seconds: float
    failed: bool = False
    inputs: int = 1


@dataclass
class Report:
    """What a campaign ran and found.

    Attributes:
        name: of the campaign.
        seed: of its cases.
        outcomes: how often each outcome occurred.
        failures: cases with an outcome that is not allowed.
        slowest: the case that took the most processor time.
        next: number of the first case that was not run; a later run can start there.
        missing: parts that were not run, and what they need.
        inputs: number of inputs tried in all cases.
        seconds: wall time.
        leftovers: files and processes that cases left behind.
        caught: where bugs were planted → how many were found.
        missed: likewise, how many were not.
    """

    name: str
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[Case] = field(default_factory=list)
    slowest: Case | None = None
    next: int = 0
    missing: list[str] = field(default_factory=list)
    inputs: int = 0
    seconds: float = 0.0
    leftovers: int = 0
    caught: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)

    def add(self, case: Case) -> None:
        """Count a case."""
        self.outcomes[case.outcome.partition(":")[0]] += 1
        self.inputs += case.inputs
        self.next = max(self.next, case.number + 1)
        if case.failed:
            self.failures.append(case)
        if self.slowest is None or case.seconds > self.slowest.seconds:
            self.slowest = case

    @property
    def cases(self) -> int:
        """Number of cases run."""
        return self.outcomes.total()

    def merge(self, more: Report) -> None:
        """Add the result of a later run of the same campaign."""
        self.outcomes += more.outcomes
        self.caught += more.caught
        self.missed += more.missed
        self.failures += more.failures
        cases = [case for case in (self.slowest, more.slowest) if case is not None]
        self.slowest = max(cases, key=lambda case: case.seconds, default=None)
        self.next, self.missing = max(self.next, more.next), more.missing
        self.inputs, self.seconds = self.inputs + more.inputs, self.seconds + more.seconds
        self.leftovers += more.leftovers

    @property
    def scores(self) -> list[str]:
        """The share of planted bugs that were found, as text."""
        totals = {where: self.caught[where] + self.missed[where] for where in (self.caught | self.missed)}
        return [f"{where}: {self.caught[where] / n:.2%} of {n} bugs caught" for where, n in sorted(totals.items())]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counts = {"outcomes": self.outcomes, "caught": self.caught, "missed": self.missed}
        return {**asdict(self), **{name: dict(count) for name, count in counts.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The report of :meth:`as_dict`."""
        slowest, failures = values["slowest"], [Case(**case) for case in values["failures"]]
        counts = {name: Counter(values.get(name, {})) for name in ("outcomes", "caught", "missed")}
        kept = {**counts, "failures": failures}
        return cls(**{**values, **kept, "slowest": None if slowest is None else Case(**slowest)})

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        inputs = f", {self.inputs} inputs" if self.inputs != self.cases else ""
        lines = [f"{self.name}, seed {self.seed}: {self.cases} cases{inputs} ({counts or 'none'})"]
        if self.slowest is not None:
            lines.append(f"  slowest: case {self.slowest.number}, {self.slowest.seconds:.2f} s: {self.slowest.what}")
        lines += [f"  {score}" for score in self.scores]
        lines += [f"  NOT RUN: {what}" for what in self.missing]
        lines += [f"  FAILED case {case.number}: {case.what}\n    {case.outcome}" for case in self.failures]
        if self.leftovers:
            lines.append(f"  {self.leftovers} leftovers")
        lines.append(f"  {len(self.failures)} failures")
        return "\n".join(lines)
