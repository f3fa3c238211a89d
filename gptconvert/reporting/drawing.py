"""How charts look: figures of matplotlib as inline SVG, in colours of the page's style sheet.

Every series differs in marker and fill as well as in colour, so that charts can be read in grey and by colour-blind
people. The same figures give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, cast

from gptconvert.errors import printable

#: Width of every chart in inches: text stays readable on a telephone.
WIDTH = 4.3
#: Placeholder colours, each of which the page replaces by a variable of its style sheet.
COLOURS: Mapping[str, str] = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--series-1)",
    "#050505": "var(--series-2)",
    "#060606": "var(--series-3)",
    "#070707": "var(--bad)",
    "#080808": "var(--page)",
    "#090909": "var(--band)",
}
INK, MUTED, RULE, FIRST, SECOND, THIRD, BAD, PAGE, BAND = COLOURS
#: Colour, marker and fill of the series.
STYLES = ((FIRST, "o", True), (SECOND, "D", False), (THIRD, "s", True), (INK, "^", False), (MUTED, "v", True))
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gptconvert",
    "text.parse_math": False,  # names may contain dollar signs
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.axisbelow": True,
}
#: With more points than this, markers are smaller.
CROWDED = 16
#: Longest name in a chart, in characters.
LONGEST = 28


@contextmanager
def new_axes(height: float, alt: str, prefix: str, rows: int = 1) -> Iterator[tuple[list[Any], list[str]]]:
    """The axes to draw on, one above the other; the list receives the SVG at the end.

    Args:
        height: of the figure, in inches.
        alt: text alternative.
        prefix: makes the identifiers of this figure unique.
        rows: how many axes.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    svg: list[str] = []
    # Without "backend", which a context does not restore.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context({**defaults, **SETTINGS}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        cast("Any", figure.get_layout_engine()).set(w_pad=0.02, h_pad=0.02)
        FigureCanvasSVG(figure)
        yield list(figure.subplots(rows, 1, squeeze=False, sharex=rows > 1)[:, 0]), svg
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg.append(inline(out.getvalue(), prefix, alt))


def draw_series(
    axis: Any, places: Sequence[tuple[float, float]], style: int, label: str, *, joined: bool = False
) -> None:
    """Draw a series; the position in the legend decides its ``style``."""
    colour, marker, filled = STYLES[style % len(STYLES)]
    axis.plot(
        [x for x, _ in places],
        [y for _, y in places],
        linestyle=((0, ()), (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)))[style % 4] if joined else "none",
        linewidth=1,
        marker=marker,
        markersize=4.6 if len(places) <= CROWDED else 2.6,
        markeredgewidth=1 if len(places) <= CROWDED else 0.7,
        color=colour,
        markerfacecolor=colour if filled else PAGE,
        label=label,
        zorder=3 + 0.1 * style,
    )


def mark_bad(axis: Any, places: Sequence[tuple[float, float]], *, crowded: bool = False) -> None:
    """Mark what fails with a cross."""
    size, width = (5.0, 1.0) if crowded else (9.0, 1.8)
    x, y = [place[0] for place in places], [place[1] for place in places]
    axis.plot(x, y, "x", color=BAD, markersize=size, markeredgewidth=width, zorder=5)


def legend(axis: Any) -> None:
    """Above the axes, in two columns."""
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.8, columnspacing=1.2,
        handletextpad=0.5, labelspacing=0.25, borderpad=0,
    )  # fmt: skip


def logarithmic(axis: Any) -> None:
    """Set a logarithmic y-axis for KL divergence."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(numticks=6))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def short_name(path: str) -> str:
    """The last part of a name, shortened. Legends omit labels that begin with an underscore."""
    name = printable(path.rpartition("/")[2])
    name = name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}…{name[-8:]}"
    return f" {name}" if name.startswith("_") else name


def inline(svg: str, prefix: str, alt: str) -> str:
    """An SVG file as an element for a page, with unique identifiers, variable colours and a text alternative."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<=[\s])id="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    head = f'<svg role="img" aria-label="{escape(alt)}" viewBox="{size[0][9:-1] if size else ""}">'
    body = svg[svg.index(">") + 1 :]
    return re.sub(r"\s*\n\s*", "\n", head + body)
