"""Flat views of a verification: the error of every block, and one row per probe group for a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from gptconvert.verify.metrics import Measure, significant
from gptconvert.verify.outputs import Group

if TYPE_CHECKING:
    from gptconvert.verify.report import Report, RunReport


def blocks_of(run: RunReport) -> list[dict[str, object]]:
    """The largest error of every tensor that shows a block's work, in the order of computation.

    The embedding and ``h.{i}`` are known only where an error was located; ``present.{i}`` only with a cache.
    """
    worst: dict[str, Measure] = {measure.tensor: measure for measure in run.taps}
    for measure in (m for group in run.groups for m in group.measures.values()):
        known = worst.get(measure.tensor)
        if known is None or (not measure.ok, measure.ratio) > (not known.ok, known.ratio):
            worst[measure.tensor] = measure
    ordered = sorted(worst.values(), key=lambda measure: _order(measure.tensor))
    return [{"tensor": m.tensor, "ratio": significant(m.ratio), "ok": m.ok} for m in ordered]


def _order(tensor: str) -> tuple[float, int, str]:
    """Embedding; then keys, values and output of every block; then the task's outputs."""
    kind, *rest = tensor.split(".")
    if kind == "embedding":
        return -1, 0, tensor
    if kind in ("present", "h") and rest:
        return int(rest[0]), int(kind == "h"), tensor
    return math.inf, 0, tensor


def rows_of(report: Report) -> list[dict[str, object]]:
    """One flat row per artifact, runtime and probe group; see :meth:`Report.to_rows`."""
    return [
        {"artifact": artifact.path, "kind": artifact.kind, "runtime": run.runtime, **_row(group)}
        for artifact in report.artifacts
        for run in artifact.runs
        for group in run.groups
    ]


def _row(group: Group) -> dict[str, object]:
    main, cache = group.worst(presents=False), group.worst(presents=True)
    return {
        "group": group.name,
        "ok": group.ok,
        "tokens": group.tokens,
        "R": None if main is None else main.ratio,
        "max_error": None if main is None else main.error_max,
        "R_present": None if cache is None else cache.ratio,
        "top1": group.similarity.top1 if group.similarity.tokens else None,
        "problems": "; ".join(group.problems),
    }


def worst_ratio(groups: Iterable[Group]) -> float | None:
    """The largest R of any tensor; None if nothing was measured."""
    return max((measure.ratio for measure in _measures(groups)), default=None)


def _measures(groups: Iterable[Group]) -> Iterator[Measure]:
    measured: Iterable[Mapping[str, Measure]] = (group.measures for group in groups)
    return (measure for measures in measured for measure in measures.values())
