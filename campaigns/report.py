"""The result of a campaign."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


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

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "campaign": self.name,
            "seed": self.seed,
            "cases": self.cases,
            "next": self.next,
            "outcomes": dict(self.outcomes.most_common()),
            "slowest": None if self.slowest is None else vars(self.slowest),
            "failures": [vars(case) for case in self.failures],
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        lines = [f"{self.name}, seed {self.seed}: {self.cases} cases ({counts})"]
        if self.slowest is not None:
            lines.append(f"  slowest: case {self.slowest.number}, {self.slowest.seconds:.2f} s: {self.slowest.what}")
        lines += [f"  FAILED case {case.number}: {case.what}\n    {case.outcome}" for case in self.failures]
        lines.append(f"  {len(self.failures)} failures; continue with --start {self.next}")
        return "\n".join(lines)
