"""Runs campaigns within a total time, in slices whose progress is kept in a file."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from campaigns.report import NotRunError, Report

#: Seconds of a slice: an interruption loses at most one.
SLICE = 120.0

Run = Callable[[int, float, int, int | None], Report]


class UnusableStateError(ValueError):
    """A file given as ``--state`` cannot be continued."""


@dataclass(frozen=True)
class Campaign:
    """A campaign.

    Attributes:
        run: function of a seed, seconds, the first case, and a single case to run instead.
        weight: share of the time.
    """

    run: Run
    weight: float

    @property
    def summary(self) -> str:
        """The first sentence of its module's docstring."""
        return (sys.modules[self.run.__module__].__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()


@dataclass
class State:
    """The progress of a run.

    Attributes:
        path: the file that keeps it; None to keep none.
        seed: of the cases.
        reports: campaign → everything it has found so far.
        done: campaigns that have used their time, or run all their cases.
    """

    path: str | None
    seed: int
    reports: dict[str, Report] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, path: str | None, seed: int | None) -> State:
        """The state in a file, or a new one.

        Raises:
            UnusableStateError: the file is damaged, or of another seed.
        """
        if path is None or not os.path.exists(path):
            return cls(path, seed or 0)
        try:
            with open(path) as file:
                raw = json.load(file)
            reports = {name: Report.from_dict(report) for name, report in raw["reports"].items()}
            state = cls(path, int(raw["seed"]), reports, set(raw["done"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnusableStateError(
                f"{path} is not the state of a run ({error!r}): delete it to start anew"
            ) from error
        if seed not in (None, state.seed):
            raise UnusableStateError(f"{path} has seed {state.seed}, not {seed}: choose another file")
        return state

    def save(self) -> None:
        """Replace the file at once."""
        if self.path is None:
            return
        reports = {name: report.as_dict() for name, report in self.reports.items()}
        with open(f"{self.path}.new", "w") as file:
            json.dump({"seed": self.seed, "done": sorted(self.done), "reports": reports}, file, indent=1)
        os.replace(f"{self.path}.new", self.path)

    def spent(self, name: str) -> float:
        """Seconds that a campaign has run."""
        return self.reports[name].seconds if name in self.reports else 0.0


def run_all(
    campaigns: Mapping[str, Campaign], state: State, total: float, *, each: float | None = None, jobs: int = 1
) -> None:
    """Run campaigns and print their reports.

    Args:
        campaigns: name → campaign.
        state: updated and saved after every slice.
        total: seconds for all campaigns.
        each: seconds for every campaign, instead of a share of ``total``.
        jobs: campaigns to run at a time.
    """
    pending = [name for name in campaigns if name not in state.done or (each or 0.0) > state.spent(name)]
    for name in set(campaigns) - set(pending):
        print(state.reports[name], flush=True)
    if jobs > 1:
        _in_parallel(campaigns, pending, state, total, each, jobs)
        return
    for at, name in enumerate(pending):
        # What others have taken too long, or left over, is shared by those still to run.
        left = total - sum(map(state.spent, campaigns)) + state.spent(name)
        share = campaigns[name].weight / sum(campaigns[other].weight for other in pending[at:])
        seconds = (each if each is not None else left * share) - state.spent(name)
        _run(name, campaigns[name], state, seconds)
        state.done.add(name)
        state.save()
        print(state.reports[name], flush=True)


def _run(name: str, campaign: Campaign, state: State, seconds: float) -> None:
    """Run slices of a campaign until the time is over or all its cases have run."""
    end, first = time.monotonic() + seconds, True
    while first or time.monotonic() < end:
        first, started = False, time.monotonic()
        report = state.reports.setdefault(name, Report(name, state.seed))
        try:
            more = campaign.run(state.seed, min(SLICE, max(0.0, end - started)), report.next, None)
        except NotRunError as error:
            report.missing = [str(error)]
            return
        more.seconds = time.monotonic() - started
        report.merge(more)
        state.save()
        if not more.cases:
            return


def _in_parallel(
    campaigns: Mapping[str, Campaign],
    pending: list[str],
    state: State,
    total: float,
    each: float | None,
    jobs: int,
) -> None:
    """Run campaigns in processes of their own, the longest first."""
    weights = sum(campaigns[name].weight for name in pending)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, context) as pool:
        waiting = {}
        for name in sorted(pending, key=lambda name: -campaigns[name].weight):
            share = min(1.0, jobs * campaigns[name].weight / weights)
            seconds = (each if each is not None else total * share) - state.spent(name)
            own = State(None, state.seed, {name: state.reports[name]} if name in state.reports else {})
            waiting[pool.submit(_run_apart, name, campaigns[name], own, seconds)] = name
        for future in as_completed(waiting):
            name = waiting[future]
            state.reports[name] = future.result()
            state.done.add(name)
            state.save()
            print(state.reports[name], flush=True)


def _run_apart(name: str, campaign: Campaign, state: State, seconds: float) -> Report:
    _run(name, campaign, state, seconds)
    return state.reports[name]
