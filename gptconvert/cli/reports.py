"""``--report``: record what a command finds, and write it to files whatever the outcome."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from gptconvert.cli.options import DISPLAY, own
from gptconvert.cli.output import note
from gptconvert.errors import GptConvertError, OutputError, VerificationError, os_errors_as
from gptconvert.model.options import INFO

if TYPE_CHECKING:
    from gptconvert.model.checkpoint import Checkpoint
    from gptconvert.reporting.files import ReportFiles

REPORT = own(
    "--report",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    group=DISPLAY,
    help="Write a report, even if verification fails: .html, .md, .xml (JUnit) or .json; repeat for several.",
)


class Recorder:
    """The fields of a report so far.

    Attributes:
        fields: of :func:`gptconvert.reporting.document.document`.
        error: why the command failed; None if it did not.
        wanted: whether a report was requested.
        kept: whether the reports that exist are kept.
    """

    def __init__(self, wanted: bool) -> None:
        self.fields: dict[str, Any] = {}
        self.error: GptConvertError | None = None
        self.wanted, self.kept = wanted, False

    def add(self, **fields: object) -> None:
        """Add fields; the keys of ``source`` extend those known."""
        source = {**self.fields.get("source", {}), **(fields.pop("source", None) or {})}  # type: ignore[dict-item]
        self.fields |= {**fields, **({"source": source} if source else {})}

    def keep(self) -> None:
        """Keep the reports that exist: the command did nothing."""
        self.kept = True


@contextmanager
def recording(given: Mapping[str, Any], command: str, output: str | None, source: str) -> Iterator[Recorder]:
    """Check the paths of ``--report``, and write the reports when the block ends, also if it raises an error.

    Args:
        given: the command's parameters.
        command: see :func:`~gptconvert.reporting.document.document`.
        output: the directory to publish or to examine, which reports must not be inside.
        source: as given.

    Raises:
        UsageError: the format of a report is unknown, or it would be inside the output, the artifact or the source.
        UnsupportedError: a package is missing.
        OutputError: a report cannot be written.
    """
    recorder = Recorder(bool(given["report"]))
    if not recorder.wanted:
        yield recorder
        return
    from gptconvert.reporting.files import ReportFiles

    inputs = [path for path in (source, *_paths(given)) if os.path.exists(path)]
    files = ReportFiles.checked(given["report"], [*filter(None, [output]), *inputs])
    recorder.add(source={"path": source})
    try:
        yield recorder
    except Exception as error:
        known = error if isinstance(error, GptConvertError) else GptConvertError(f"{type(error).__name__}: {error}")
        recorder.error = known
        if isinstance(known, VerificationError):
            recorder.add(verification=known.report, source=known.source)
        try:
            _write(files, _document(command, recorder))
        except OutputError as unwritten:
            note(str(unwritten))
        raise
    if recorder.kept:
        return
    try:
        _write(files, _document(command, recorder))
    except OutputError as error:
        error.hint = "only the report is missing; the rest of the command is done"
        raise


def _write(files: ReportFiles, found: Mapping[str, Any]) -> None:
    """Write the reports. matplotlib, which stores a list of fonts, leaves nothing in the home directory."""
    if "MPLCONFIGDIR" in os.environ or not any(path.lower().endswith(".html") for path in files.paths):
        files.write(found)
        return
    from gptconvert.publish.scratch import Scratch

    with os_errors_as(OutputError, "a temporary directory cannot be created", tempfile.gettempdir()):
        scratch = Scratch()
    try:
        os.environ["MPLCONFIGDIR"] = scratch.path
        files.write(found)
    finally:
        del os.environ["MPLCONFIGDIR"]
        scratch.remove()


def _paths(given: Mapping[str, Any]) -> Iterable[str]:
    """The values of options that name files and directories to read."""
    return [given[n] for n, info in INFO.items() if info.metavar in ("FILE", "DIR") and given.get(n)]


def _document(command: str, recorder: Recorder) -> dict[str, Any]:
    from gptconvert.reporting.document import document

    error = None if recorder.error is None else recorder.error.as_dict()
    arguments = click.get_current_context().meta["gptconvert.arguments"]
    return document(command, arguments, **{**recorder.fields, "ok": error is None, "error": error})


def digested(checkpoint: Checkpoint) -> list[dict[str, object]]:
    """Name, size and SHA-256 of every file of a checkpoint, which are read whole."""
    files = {os.path.basename(path): path for path in checkpoint.source.files if os.path.isfile(path)}
    return [{"name": name, **_digest(path)} for name, path in sorted(files.items())]


def digested_files(artifact: str) -> list[dict[str, object]]:
    """Path, size and SHA-256 of every file of an export, which are read whole."""
    if os.path.isfile(artifact):
        return [{"path": os.path.basename(artifact), **_digest(artifact)}]
    found = (os.path.join(folder, name) for folder, _, names in os.walk(artifact) for name in names)
    files = {os.path.relpath(path, artifact).replace(os.sep, "/"): path for path in found if os.path.isfile(path)}
    return [{"path": name, **_digest(path)} for name, path in sorted(files.items())]


def _digest(path: str) -> dict[str, object]:
    from gptconvert.publish.source_reader import digest_files

    digest = digest_files([path])[path]
    return {"size": digest.nbytes, digest.algorithm: digest.value}
