"""Elements of the HTML of a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from gptconvert.errors import printable
from gptconvert.reporting.charts import Chart

#: Entries of a list; the rest are counted.
MOST_LISTED = 200


def figures(charts: Iterable[Chart | None]) -> Iterator[str]:
    """Charts side by side, as far as the page is wide; None is left out."""
    drawn = [chart for chart in charts if chart is not None]
    if drawn:
        yield '<div class="charts">'
        for chart in drawn:
            yield f"<figure><h4>{chart.title}</h4>{chart.svg}<figcaption>{text(chart.caption)}</figcaption></figure>"
        yield "</div>"


def folded(
    title: str, inner: Iterable[str], about: str = "", *, opened: bool = False, printed: bool = True
) -> Iterator[str]:
    """A collapsible part; ``printed`` if it is printed although it is collapsed."""
    kind = ' class="printed"' if printed else ""
    yield f"<details{kind}{' open' * opened}><summary>{text(title)}{about}</summary>"
    yield from inner
    yield "</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> Iterator[str]:
    """A table of cells that are HTML already."""
    if not rows:
        return
    aligned = [' class="n"' if i in {*right} else "" for i in range(len(head))]
    yield '<div class="scroll"><table>'
    titles = "".join(f'<th{a} scope="col">{title}</th>' for a, title in zip(aligned, head, strict=True))
    yield f"<thead><tr>{titles}</tr></thead><tbody>"
    for row in rows:
        yield "<tr>" + "".join(f"<td{a}>{cell}</td>" for a, cell in zip(aligned, row, strict=True)) + "</tr>"
    yield "</tbody></table></div>"


def listing(items: Iterable[str]) -> str:
    """A list of items that are HTML already."""
    listed = list(items)
    more = [f"… {len(listed) - MOST_LISTED} more"] if len(listed) > MOST_LISTED else []
    items = [f"<li>{item}</li>" for item in (*listed[:MOST_LISTED], *more)]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def mark(ok: bool | None, words: tuple[str, str, str] = ("passed", "failed", "–")) -> str:
    """A verdict, which does not depend on colour."""
    if ok is None:
        return words[2]
    return f'<span class="{"pass" if ok else "fail"}">{"✓" if ok else "✗"} {words[0] if ok else words[1]}</span>'


def joined(*parts: str | None) -> str:
    """The parts that are not empty, with commas."""
    return ", ".join(part for part in parts if part)


def number(value: float | None) -> str:
    """Two digits of a figure."""
    return "–" if value is None else f"{value:.2g}"


def code(value: object) -> str:
    """A name; empty if there is none."""
    return f"<code>{text(value)}</code>" if value else ""


def text(value: object) -> str:
    """Text on one line, escaped: names come from untrusted files."""
    return escape(printable(value))
