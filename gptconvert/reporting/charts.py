"""The charts of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from gptconvert.reporting.document import ratio_text
from gptconvert.reporting.drawing import (
    BAND,
    CROWDED,
    INK,
    MUTED,
    draw_series,
    legend,
    logarithmic,
    mark_bad,
    new_axes,
    short_name,
)

#: The rule's limit for R, and the R of the mildest planted bug that outputs show with a checkpoint's own weights:
#: attention scores in half precision in one layer, 5.5 times the limit (docs/verification.md).
GATE, MILDEST_BUG = 4.0, 22.0
#: Ratios outside this range are drawn at its ends.
LEAST, MOST = 0.1, 1e6


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: above it.
        svg: the element.
        caption: below it.
    """

    title: str
    svg: str
    caption: str


class Charts:
    """Draws charts whose identifiers are unique within one page.

    Args:
        page: distinguishes pages that are shown together, as in a notebook.
    """

    def __init__(self, page: str = "") -> None:
        self._page, self._count = page, 0

    def _axes(self, height: float, alt: str, rows: int = 1) -> AbstractContextManager[tuple[list[Any], list[str]]]:
        self._count += 1
        return new_axes(height, alt, f"{self._page}c{self._count}-", rows)

    def ratios(self, run: Mapping[str, Any]) -> Chart | None:
        """R of every probe group against the gate; None if nothing was run."""
        groups = run["groups"]
        if not groups:
            return None
        outputs = [_ratio(group, presents=False) for group in groups]
        caches = [_ratio(group, presents=True) for group in groups]
        failed = [group["group"] for group in groups if not group["ok"]]
        known = [ratio for ratio in (*outputs, *caches) if ratio is not None]
        largest = f"the largest is {_shown(max(known))}" if known else "no group has a figure"
        alt = f"R of {len(groups)} probe groups on a logarithmic scale: {largest}; the gate is {GATE:g}; " + (
            f"failed: {', '.join(failed)}" if failed else "all pass"
        )
        with self._axes(0.62 + 0.2 * len(groups), alt) as (axes, svg):
            axis, places = axes[0], range(len(groups))
            most = _scale(axis, known, "x")
            _lines(axis, "x", most)
            for values, style, label in ((caches, 1, "keys and values"), (outputs, 0, "outputs")):
                if any(value is not None for value in values):
                    drawn = [(_clipped(v, most), y) for v, y in zip(values, places, strict=True) if v is not None]
                    draw_series(axis, drawn, style, label)
            for y, group, value in zip(places, groups, outputs, strict=True):
                if not group["ok"]:
                    x = _clipped(math.inf if value is None else value, most)
                    mark_bad(axis, [(x, y)])
            axis.set_yticks(places, [short_name(group["group"]) for group in groups])
            axis.set_ylim(len(groups) - 0.4, -0.6)
            axis.grid(axis="y")
            axis.tick_params(axis="y", length=0)
            axis.set_xlabel("R: error ÷ unavoidable rounding error")
            legend(axis)
        return Chart("Error of every kind of input", svg[0], _caption(failed))

    def blocks(self, run: Mapping[str, Any]) -> Chart | None:
        """The error of every block; None if fewer than two tensors show it."""
        names = list(dict.fromkeys(_block(tensor["tensor"]) for tensor in run["blocks"]))
        if len(names) < 2:
            return None
        wrong = list(dict.fromkeys(_block(t["tensor"]) for t in run["blocks"] if not t["ok"]))
        place = run["first_bad_block"]
        alt = f"R of the embedding, blocks and outputs: {', '.join(names[:1])} to {names[-1]}; " + (
            f"outside the limits from {wrong[0]} on" if wrong else f"all are below the gate of {GATE:g}"
        )
        with self._axes(2.3, alt) as (axes, svg):
            axis = axes[0]
            known = [_finite(tensor["ratio"]) for tensor in run["blocks"]]
            most = _scale(axis, known, "y")
            _lines(axis, "y", most)
            for style, (label, matches) in enumerate(SERIES.items()):
                points = [
                    (names.index(_block(t["tensor"])), _clipped(_finite(t["ratio"]), most))
                    for t in run["blocks"]
                    if re.fullmatch(matches, t["tensor"])
                ]
                if points:
                    draw_series(axis, points, style, label, joined=True)
            bad = [(names.index(_block(t["tensor"])), _finite(t["ratio"])) for t in run["blocks"] if not t["ok"]]
            mark_bad(axis, [(x, _clipped(y, most)) for x, y in bad], crowded=len(names) > CROWDED)
            ticks = _ticks(names)
            axis.set_xticks(ticks, [short_name(names[i].removeprefix("block ")) for i in ticks])
            axis.set_xlim(-0.5, len(names) - 0.5)
            axis.set_xlabel("block, in the order of computation")
            axis.set_ylabel("R")
            legend(axis)
        where = f"The error begins in {place}." if place else "No block leaves the range of rounding."
        without = "" if run.get("first_bad_block") else " Keys and values show what reaches each block."
        return Chart(
            "Error of every block",
            svg[0],
            where + (without if any("present" in t["tensor"] for t in run["blocks"]) else ""),
        )

    def positions(self, graphs: Sequence[Mapping[str, Any]]) -> Chart | None:
        """KL divergence and top-1 agreement by position; None if no graph has positions."""
        graphs = [graph for graph in graphs if graph.get("by_position")]
        if not graphs:
            return None
        alt = "Mean KL divergence, and agreement of the most likely token, by position in the text: " + "; ".join(
            f"{graph['path']} {graph['kl_mean']:.2g} nats and {graph['top1']:.1%} overall" for graph in graphs
        )
        with self._axes(3.3, alt, rows=2) as ((above, below), svg):
            for style, graph in enumerate(graphs):
                rows, label = graph["by_position"], short_name(graph["path"])
                draw_series(
                    above, [(i, max(row["kl_mean"], 1e-12)) for i, row in enumerate(rows)], style, label, joined=True
                )
                draw_series(below, [(i, 100 * row["top1"]) for i, row in enumerate(rows)], style, label, joined=True)
            rows = max((graph["by_position"] for graph in graphs), key=len)
            logarithmic(above)
            above.set_ylabel("mean KL, nats")
            below.set_ylabel("same top-1, %")
            below.set_ylim(top=100.9)
            below.set_xticks(range(len(rows)), [_span(row) for row in rows])
            below.set_xlabel("position in the text")
            for axis in (above, below):
                axis.grid(axis="y")
            legend(above)
        return Chart("Quality by position", svg[0], "Lower divergence and higher agreement are better.")

    def sizes(self, graphs: Sequence[Mapping[str, Any]], lossless: int | None) -> Chart | None:
        """Size against KL divergence; None if fewer than two graphs can be compared.

        ``lossless`` is the size of the graph in float32, if there is one.
        """
        graphs = [graph for graph in graphs if graph.get("kl_mean") and graph.get("size")]
        if len(graphs) + bool(lossless) < 2 or not graphs:
            return None
        sizes = [f"{graph['path']} {graph['size'] / 1e6:.3g} MB, {graph['kl_mean']:.2g} nats" for graph in graphs]
        lossless_text = f"; without loss {lossless / 1e6:.3g} MB" if lossless else ""
        with self._axes(2.1, f"Size against mean KL divergence: {'; '.join(sizes)}{lossless_text}") as (axes, svg):
            axis = axes[0]
            for style, graph in enumerate(graphs):
                name = short_name(graph["path"])
                draw_series(axis, [(graph["size"] / 1e6, graph["kl_mean"])], style, name)
            if lossless:
                axis.axvline(lossless / 1e6, color=MUTED, linewidth=1, linestyle=(0, (4, 2)), label="without loss")
            logarithmic(axis)
            axis.set_xlim(0, 1.12 * max(lossless or 0, *(graph["size"] for graph in graphs)) / 1e6)
            figures = [graph["kl_mean"] for graph in graphs]
            axis.set_ylim(min(figures) / 4, max(figures) * 4)
            axis.grid()
            axis.set_xlabel("size, MB")
            axis.set_ylabel("mean KL, nats")
            legend(axis)
        return Chart("Size against quality", svg[0], "Down and to the left is better.")


#: Legend of :meth:`Charts.blocks` → the tensors.
SERIES = {"outputs": r"(?!present\.|h\.|embedding).+", "keys": r"present\.\d+\.key", "values": r"present\.\d+\.value"}
SERIES["output of the block"] = r"embedding|h\.\d+"


def _block(tensor: str) -> str:
    """``block 3`` of ``present.3.key`` and ``h.3``; embedding and outputs by name."""
    kind, _, rest = tensor.partition(".")
    return f"block {rest.partition('.')[0]}" if kind in ("present", "h") and rest else tensor


def _ticks(names: Sequence[str]) -> list[int]:
    """Places of the names that fit below an axis: the ends, and blocks at even distances that do not touch them."""
    last = len(names) - 1
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 10**9) if len(names) / step <= 12)
    if step == 1:
        return [*range(len(names))]
    free = range(math.ceil(0.13 * last), last - math.ceil(0.08 * last))
    blocks = {i: names[i].removeprefix("block ") for i in free}
    return [0, *(i for i, number in blocks.items() if number.isdigit() and int(number) % step == 0), last]


def _ratio(group: Mapping[str, Any], *, presents: bool) -> float | None:
    """The largest R of a group's outputs, or of its keys and values; None if it has none."""
    found = [_finite(m["ratio"]) for m in group["measures"] if m["tensor"].startswith("present.") == presents]
    return max(found, default=None)


def _finite(ratio: float | None) -> float:
    return math.inf if ratio is None else ratio


def _shown(ratio: float) -> str:
    return ratio_text(None if math.isinf(ratio) else ratio)


def _clipped(ratio: float, most: float) -> float:
    return min(max(ratio, LEAST), most)


def _scale(axis: Any, ratios: Sequence[float], which: str) -> float:
    """Set a logarithmic axis that shows the gate and the mildest bug; returns the largest ratio that it shows."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    most = 10 ** math.ceil(
        math.log10(min(MOST, max(100.0, *(ratio for ratio in (*ratios, 1.0) if ratio < math.inf))))
    )
    if any(math.isinf(ratio) for ratio in ratios):
        most = min(MOST, most * 10)
    getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"set_{which}lim")(LEAST, most * 1.15)
    scale = getattr(axis, f"{which}axis")
    scale.set_major_locator(LogLocator(numticks=7))
    scale.set_minor_locator(NullLocator())
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else f"10{_raised(value)}"))
    axis.grid(axis=which)
    return float(most)


def _raised(value: float) -> str:
    return str(round(math.log10(value))).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _lines(axis: Any, which: str, most: float) -> None:
    """The gate, the mildest bug, and a band where everything fails."""
    line, span = (axis.axvline, axis.axvspan) if which == "x" else (axis.axhline, axis.axhspan)
    span(GATE, most * 1.15, color=BAND, linewidth=0, zorder=0)
    line(GATE, color=INK, linewidth=1.2, label=f"gate: {GATE:g}")
    line(MILDEST_BUG, color=MUTED, linewidth=1, linestyle=(0, (4, 2)), label=f"mildest planted bug: {MILDEST_BUG:g}")


def _span(row: Mapping[str, int]) -> str:
    return str(row["first"]) if row["first"] == row["last"] else f"{row['first']}–\n{row['last']}"


def _caption(failed: Sequence[str]) -> str:
    if failed:
        return (
            f"Marked ×: {len(failed)} that fail, by R, by the largest single error, or by a check without a figure."
        )
    return "1 is the error of a correct model in the same arithmetic; above 4, verification fails."
