"""Results of a verification: plain values for ``--json`` and the manifest, and a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptconvert.errors import printable
from gptconvert.verify.metrics import FLOOR_ROUNDINGS, MAX_ABS_RATIO, MAX_RMSE_RATIO, MOST_NOISE, Measure
from gptconvert.verify.outputs import Group
from gptconvert.verify.quality import Quality
from gptconvert.verify.report_rows import blocks_of, rows_of, worst_ratio
from gptconvert.verify.weights import WeightReport

if TYPE_CHECKING:
    from gptconvert.verify.greedy import Continuation

#: The table shows at most this many of a list of problems.
MOST_SHOWN = 8


@dataclass
class RunReport:
    """All probes on one runtime.

    Attributes:
        runtime: its name and configuration.
        groups: results, in probe order.
        first_bad: where the error begins; None if there is none or it was not located.
        stressed: whether stress weights ran in place of the checkpoint's.
        yardstick: what measured the rounding noise, if not the reference model in the computing type.
        taps: figures of the embedding and of every block's output, where an error was located.
    """

    runtime: str
    groups: list[Group]
    first_bad: str | None = None
    stressed: bool = False
    yardstick: str = ""
    taps: tuple[Measure, ...] = ()

    @property
    def ok(self) -> bool:
        """The gate."""
        return bool(self.groups) and all(group.ok for group in self.groups)

    def as_dict(self, figures: bool) -> dict[str, object]:
        """Plain values."""
        groups = [_group_dict(group, figures) for group in self.groups]
        fields = {"runtime": self.runtime, "ok": self.ok, "first_bad_block": self.first_bad, "groups": groups}
        fields |= {"yardstick": self.yardstick} if self.yardstick else {}
        return {**fields, "stressed": self.stressed, "blocks": blocks_of(self)} if figures else fields

    def __repr__(self) -> str:
        passed = sum(group.ok for group in self.groups)
        return f"<RunReport {self.runtime!r}: {passed} of {len(self.groups)} probe groups within noise>"


@dataclass
class ArtifactReport:
    """One artifact.

    Attributes:
        kind: ``onnx``, ``safetensors``.
        path: relative to the path being verified.
        weights: rule 1.
        runs: rule 2, once per runtime; empty for artifacts that do not compute.
        problems: other failures: names, types and shapes of the contract, nodes, a configuration that differs.
        notes: for the user, one sentence each.
        probes: the probes that were run.
        computes: whether outputs must be computed; if not, weights alone decide.
        seconds: wall time.
        greedy: its greedy continuation, to be checked against other artifacts; None if it cannot generate by itself.
        quality: rule 3; None if the artifact loses nothing, or was not measured.
        size: bytes of its files; None if unknown.
    """

    kind: str
    path: str
    weights: WeightReport
    runs: list[RunReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probes: list[dict[str, object]] = field(default_factory=list)
    computes: bool = True
    seconds: float = 0.0
    greedy: Continuation | None = None
    quality: Quality | None = None
    size: int | None = None

    def __repr__(self) -> str:
        verdict, runs = "verified" if self.ok else "FAILED", len(self.runs)
        return f"<ArtifactReport {self.path!r}: {verdict}, {runs} run{'s' * (runs != 1)}>"

    @property
    def ok(self) -> bool:
        """The gate."""
        return self.proven and (self.quality is None or self.quality.ok)

    @property
    def proven(self) -> bool:
        """Whether it passes rules 1 and 2. Something that computes and was not run does not."""
        ran = bool(self.runs) or not self.computes
        return ran and self.weights.ok and not self.problems and all(run.ok for run in self.runs)

    def as_dict(self, figures: bool) -> dict[str, object]:
        """Plain values."""
        fields: dict[str, object] = {
            "kind": self.kind,
            "path": self.path,
            "ok": self.ok,
            "weights": self.weights.as_dict(figures),
            "problems": list(self.problems),
            "runs": [run.as_dict(figures) for run in self.runs],
            "probes": self.probes,
            **({} if self.quality is None else {"quality": self.quality.as_dict(figures)}),
        }
        return {**fields, "size": self.size, "seconds": round(self.seconds, 2)} if figures else fields


@dataclass
class PackageReport:
    """The files beside the artifacts of an existing directory: checksums, configuration, tokenizer.

    Attributes:
        files: those compared.
        problems: differences from the checkpoint's.
        notes: for the user, one sentence each.
    """

    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Plain values."""
        return {"ok": not self.problems, "files": list(self.files), "problems": list(self.problems)}


@dataclass
class Report:
    """A whole verification.

    Attributes:
        level: ``default`` or ``full``.
        artifacts: one report each.
        package: the files beside the artifacts; None if they were not compared.
    """

    level: str
    artifacts: list[ArtifactReport] = field(default_factory=list)
    package: PackageReport | None = None

    @property
    def passed(self) -> bool:
        """Whether the package and all artifacts passed; false if there are no artifacts."""
        agrees = self.package is None or not self.package.problems
        return bool(self.artifacts) and agrees and all(artifact.ok for artifact in self.artifacts)

    @property
    def misses_limit(self) -> bool:
        """Whether it fails only because quantised graphs lose more than the limit."""
        agrees = self.package is None or not self.package.problems
        measured = [artifact.quality for artifact in self.artifacts if not artifact.ok and artifact.proven]
        failed = [artifact for artifact in self.artifacts if not artifact.ok]
        missed = [quality for quality in measured if quality is not None and quality.figures is not None]
        return agrees and 0 < len(failed) == len(missed)

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user, one sentence each.

        They are about the package, weights checked only through the outputs, and outputs whose comparison proves
        nothing.
        """
        notes = (n for each in self.artifacts for n in (*each.notes, *_not_found(each), *_unprovable(each)))
        return tuple(dict.fromkeys((*(self.package.notes if self.package else ()), *notes)))

    def as_dict(self, *, figures: bool = True) -> dict[str, object]:
        """Plain values for JSON.

        Args:
            figures: include everything that was measured. The rest (verdicts, rule, probes) is the same on every
                machine, so a manifest can hold it.
        """
        return {
            "passed": self.passed,
            "level": self.level,
            "rule": {
                "max_rmse_ratio": MAX_RMSE_RATIO,
                "max_abs_ratio": MAX_ABS_RATIO,
                "floor_roundings": FLOOR_ROUNDINGS,
                "yardstick": "reference model in the computing type, against the same in float64",
            },
            **({} if self.package is None else {"package": self.package.as_dict()}),
            "artifacts": [artifact.as_dict(figures) for artifact in self.artifacts],
        }

    def to_rows(self) -> list[dict[str, object]]:
        """One flat row per artifact, runtime and probe group, for ``pandas.DataFrame(report.to_rows())``.

        The columns are artifact, kind, runtime, group, ok, tokens, R and max_error of the task's outputs,
        R_present of keys and values, top1, and problems. What was not measured is None.
        """
        return rows_of(self)

    def __repr__(self) -> str:
        worst = worst_ratio(group for artifact in self.artifacts for run in artifact.runs for group in run.groups)
        largest = "" if worst is None else f", worst R {_ratio(worst)}"
        return f"<Report: {self.verdict}; {len(self.artifacts)} artifacts{largest}>"

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        from gptconvert.reporting.html import fragment

        return fragment({"command": "verify", "ok": self.passed, "verification": self.as_dict(), "notes": self.notes})

    def table(self, *, verbose: bool = False) -> str:
        """Readable text: one line per artifact and runtime, or every probe group.

        Args:
            verbose: show every probe group; a failed verification always does.
        """
        verbose = verbose or not self.passed
        lines = [] if self.package is None else _package_lines(self.package)
        lines += [line for artifact in self.artifacts for line in _artifact_lines(artifact, verbose)]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """The result, with its qualification."""
        if self.misses_limit:
            return "VERIFICATION FAILED: a quantised graph loses more than its limit allows"
        if not self.passed:
            return "VERIFICATION FAILED" if self.artifacts else "nothing to verify"
        count = sum(len(artifact.weights.outputs_only) for artifact in self.artifacts)
        if not count:
            return "verified"
        return f"verified, except for {_weights(count)} found in no stored form: outputs only"


def _not_found(artifact: ArtifactReport) -> Iterator[str]:
    """A note on the weights that were checked only through the outputs."""
    names = artifact.weights.outputs_only
    if names:
        more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
        verb, their, them = ("is", "its", "it") if len(names) == 1 else ("are", "their", "them")
        stressed = any(run.stressed for run in artifact.runs)
        yield (
            f"{artifact.path}: {_weights(len(names))} {verb} found in no stored form "
            f"({', '.join(names[:MOST_SHOWN])}{more}), so only {their} effect on the probes' outputs was compared"
            + (f", and stress weights did not replace {them}" if stressed else "")
        )


def _weights(count: int) -> str:
    return "1 weight" if count == 1 else f"{count} weights"


def _unprovable(artifact: ArtifactReport) -> Iterator[str]:
    """One note per output in which rounding noise hides errors."""
    shares: dict[str, float] = {}
    runs = [run for run in artifact.runs if not run.stressed]
    for measure in (m for run in runs for group in run.groups for m in group.measures.values()):
        if not measure.tensor.startswith("present."):
            shares[measure.tensor] = max(shares.get(measure.tensor, 0.0), measure.noise_share)
    for name, share in shares.items():
        if not share <= MOST_NOISE:
            yield (
                f"{artifact.path}: nothing is proven about {name}, because rounding alone changes it by {share:.0%} "
                "of its size, as happens when weights are huge or nearly cancel"
            )


def _group_dict(group: Group, figures: bool) -> dict[str, object]:
    fields: dict[str, object] = {"group": group.name, "ok": group.ok, "tokens": group.tokens}
    if not figures:
        return fields
    shown = [*_shown(group), *group.measures.values()]
    measures = {m.tensor: m.as_dict() for i, m in enumerate(shown) if m is not None and (i < 2 or not m.ok)}
    similarity = {"similarity": group.similarity.as_dict()} if group.similarity.tokens else {}
    return {**fields, "problems": list(group.problems), "measures": list(measures.values()), **similarity}


def _package_lines(package: PackageReport) -> list[str]:
    if not package.files:
        return []
    files, wrong = len(package.files), len({problem.partition(": ")[0] for problem in package.problems})
    count = f"{files} file{'s' * (files > 1)}"
    verdict = f"{wrong} of {count} disagree{'s' * (wrong == 1)}{_mark(False)}"
    if not wrong:
        verdict = f"{count} agree{'s' * (files == 1)}"
    return [f"checksums, configuration and tokenizer: {verdict}", *_some(package.problems)]


def _artifact_lines(artifact: ArtifactReport, verbose: bool) -> list[str]:
    weights = artifact.weights
    found = "equal" if weights.strict else "found and equal"
    lines = [f"{artifact.path}  ({artifact.kind})"]
    lines.append(f"  weights: {weights.equal} of {weights.expected} {found}, byte for byte{_mark(weights.ok)}")
    lines += _some(weights.problems)
    if artifact.problems:
        lines += ["  contract: FAIL", *_some(artifact.problems)]
    for run in artifact.runs:
        lines += _run_lines(run) if verbose else [_run_line(run)]
    if any(run.stressed and not run.ok for run in artifact.runs):
        lines.append("  the graph computes another function, though the checkpoint's own weights do not show it")
    if artifact.quality is not None:
        lines += artifact.quality.lines()
    if artifact.computes and not artifact.runs:
        lines.append("  outputs: not run, for the reasons above")
    return lines


def _run_line(run: RunReport) -> str:
    """A run on one line: how many groups passed, and the largest R of the verbose table."""
    passed = sum(group.ok for group in run.groups)
    shown = [(m.ratio, group.name) for group in run.groups for m in _shown(group) if m is not None]
    worst, name = max(shown, default=(None, ""))
    where = "" if worst is None else f", worst R {_ratio(worst)} ({name})"
    return f"  {run.runtime}: {passed} of {len(run.groups)} probe groups within noise{where}"


def _run_lines(run: RunReport) -> list[str]:
    head = ("probes", "tokens", "R", "max|Δ|", "R present", "top-1", "")
    rows = [head, *(_group_row(group) for group in run.groups)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [f"  outputs: {run.runtime}{_mark(run.ok)}"]
    for row in rows:
        cells = [c.ljust(w) if i in (0, 6) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(("    " + "  ".join(cells)).rstrip())
    for group in run.groups:
        lines += _some([f"{group.name}: {problem}" for problem in group.problems])
    if run.first_bad:
        lines.append(f"    the error begins in {run.first_bad}")
    return lines


def _group_row(group: Group) -> tuple[str, ...]:
    main, cache = _shown(group)
    top = f"{group.similarity.top1:.1%}" if group.similarity.tokens else "-"
    largest = "-" if main is None else f"{main.error_max:.1e}"
    verdict = "ok" if group.ok else "FAIL"
    return group.name, str(group.tokens), _r_of(main), largest, _r_of(cache), top, verdict


def _shown(group: Group) -> tuple[Measure | None, Measure | None]:
    """The measures nearest to failing: of the task's outputs, of keys and values."""
    return group.worst(presents=False), group.worst(presents=True)


def _r_of(measure: Measure | None) -> str:
    return "-" if measure is None else _ratio(measure.ratio)


def _ratio(ratio: float) -> str:
    """R, in units of the rounding noise."""
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.1e}"


def _mark(ok: bool) -> str:
    return "" if ok else "  FAIL"


def _some(problems: list[str]) -> list[str]:
    """The first few, one per line."""
    more = [f"    … {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
    return [f"    {printable(problem)}" for problem in problems[:MOST_SHOWN]] + more
