"""The files of ``--report``: checked before the work begins, written after it, whatever its outcome."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gptconvert.errors import OutputError, UnsupportedError, UsageError, install_hint, os_errors_as
from gptconvert.reporting.document import Document

#: A file that contains this near its beginning is a report, and may be replaced.
MARK = "gptconvert report"
#: Bytes at the beginning of a file in which the mark is looked for.
MARK_WITHIN = 4096


def _html(found: Document) -> str:
    from gptconvert.reporting.html import page

    return page(found)


def _markdown(found: Document) -> str:
    from gptconvert.reporting.markdown import page

    return page(found)


def _junit(found: Document) -> str:
    from gptconvert.reporting.junit import test_suites

    return test_suites(found)


def _json(found: Document) -> str:
    import json

    return json.dumps({"about": MARK, **found}, indent=2) + "\n"


#: Suffix → what renders the document.
FORMATS: Mapping[str, Callable[[Document], str]] = {".html": _html, ".md": _markdown, ".xml": _junit, ".json": _json}


@dataclass(frozen=True)
class ReportFiles:
    """Where to write reports.

    Attributes:
        paths: as given.
    """

    paths: tuple[str, ...]

    @classmethod
    def checked(cls, paths: Iterable[str], apart_from: Iterable[str]) -> ReportFiles:
        """Check that every report can be written; write nothing.

        Args:
            paths: as given with ``--report``.
            apart_from: the output, the artifact and the source: files that reports must not replace, and directories
                that they must not be inside.

        Raises:
            UsageError: a suffix is unknown, or a report would be inside one of ``apart_from``.
            UnsupportedError: matplotlib is missing, which HTML needs.
            OutputError: a path cannot be written, or is a file that is not a report.
        """
        paths, apart_from = tuple(dict.fromkeys(paths)), tuple(apart_from)
        for path in paths:
            suffix = _suffix(path)
            if suffix not in FORMATS:
                expected = f"a file name ending in {', '.join(FORMATS)}"
                raise UsageError("the format of a report follows from its suffix", path=path, expected=expected)
            if suffix == ".html" and importlib.util.find_spec("matplotlib") is None:
                hint = f"{install_hint('report')}; reports in .md, .xml and .json need nothing"
                raise UnsupportedError("the charts of an HTML report need the package matplotlib", hint=hint)
            for other in apart_from:
                _check_separate(path, other)
            with os_errors_as(OutputError, "the report cannot be written", path):
                _check_writable(path)
        return cls(paths)

    def write(self, found: Document) -> None:
        """Write every report, each to a temporary file first. Missing directories are created.

        Raises:
            OutputError: one cannot be written.
        """
        for path in self.paths:
            content = FORMATS[_suffix(path)](found).encode("utf-8", "replace")
            with os_errors_as(OutputError, "the report cannot be written", path):
                _replace(os.path.realpath(path), content)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _check_separate(path: str, other: str) -> None:
    real, protected = os.path.realpath(path), os.path.realpath(other)
    if os.path.isdir(protected) or not os.path.exists(protected):
        inside = os.path.commonpath([real, protected]) == protected
    else:
        inside = real == protected
    if inside:
        raise UsageError(
            f"the report would be {'inside' if real != protected else 'at the same path as'} {other}",
            path=path,
            hint="choose a path outside it: its files are complete, and their checksums are listed",
        )


def _check_writable(path: str) -> None:
    """Raise OutputError unless the file is absent or a report, and its directory can be written."""
    path = os.path.realpath(path)
    if os.path.lexists(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OutputError("the report's path exists and is not a file", path=path, hint="choose another path")
        with open(path, "rb") as file:
            begins = file.read(MARK_WITHIN)
        if begins.strip() and MARK.encode() not in begins:
            hint = "choose another path, or delete the file"
            raise OutputError("the file exists and is not a report of gptconvert", path=path, hint=hint)
    parent = os.path.dirname(path)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise OutputError("a parent of the report is not a directory", path=parent, hint="choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        hint = "choose another path, or change the permissions"
        raise OutputError("the report cannot be written: its directory is not writable", path=parent, hint=hint)


def _replace(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.part"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
