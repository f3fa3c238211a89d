"""Run one job in this process: skip it if its output is up to date, otherwise convert."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Protocol

from gptconvert.batch.current import Open, difference, open_in, read_manifest
from gptconvert.batch.jobs import Job, is_url
from gptconvert.batch.results import Record
from gptconvert.errors import OutputError
from gptconvert.inspection import open_checkpoint
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.progress import Progress
from gptconvert.pipeline import DESCRIBED, convert, plan
from gptconvert.publish.manifest import MANIFEST_FILE
from gptconvert.publish.scratch import Scratch


class Output(Protocol):
    """Where a job publishes.

    Attributes:
        directory: the local directory to convert to.
    """

    directory: str

    def exists(self) -> bool:
        """Whether a conversion would replace something."""
        ...

    @property
    def open(self) -> Open:
        """Opens files of the existing output."""
        ...

    def publish(self) -> None:
        """Move the converted directory to where it belongs."""
        ...


class LocalOutput:
    """A directory, which the conversion itself publishes."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def exists(self) -> bool:
        """Whether it is a directory that is not empty; a conversion reports anything else."""
        return os.path.isdir(self.directory) and bool(os.listdir(self.directory))

    @property
    def open(self) -> Open:
        """Opens files of the existing output."""
        return open_in(self.directory)

    def publish(self) -> None:
        """Do nothing."""


def run_alone(job: Job, progress: Progress | None = None) -> Record:
    """Run a job.

    Raises:
        GptConvertError: it failed. The output is unchanged, except that a remote one that was to be replaced may be
            gone.
    """
    with ExitStack() as stack:
        source, notes = job.source, list[str]()
        if is_url(job.source):
            from gptconvert.batch.remote import fetch

            source, notes = fetch(job.source, stack.enter_context(Scratch()))
        checkpoint = open_checkpoint(source, job.options, format=job.format)
        output = _output_of(job, checkpoint, stack)
        if output.exists():
            found = difference(checkpoint, output.open)
            if found is None:
                return Record("skipped", details=_published(output.open, notes))
            _require_force(job, found)
        result = convert(checkpoint, output.directory, progress=progress)
        published = _published(open_in(output.directory), [*notes, *result.notes])
        output.publish()
    return Record("converted", details=published)


def _output_of(job: Job, checkpoint: Checkpoint, stack: ExitStack) -> Output:
    if not is_url(job.output):
        return LocalOutput(job.output)
    from gptconvert.batch.remote import RemoteOutput

    names = {*(file.path for file in plan(checkpoint).files), *DESCRIBED}
    directory = os.path.join(stack.enter_context(Scratch()), "output")
    return RemoteOutput(job.output, directory, names, force=job.options.force)


def _require_force(job: Job, found: str) -> None:
    """Refuse to replace an output that is there but not right."""
    if not job.options.force:
        raise OutputError(
            f"output exists and is not up to date: {found}",
            path=job.output,
            hint='replace it with --force or "options": {"force": true}, or choose another output',
        )


def _published(open_file: Open, notes: list[str]) -> Mapping[str, Any]:
    """What a result says of an output, from its manifest."""
    with open_file(MANIFEST_FILE) as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    manifest = read_manifest(open_file) or {}
    config = manifest.get("config", {})
    return {
        "family": config.get("family"),
        "task": config.get("task"),
        "verified": manifest.get("verification") is not None,
        "size": sum(each["size"] for each in manifest.get("files", ())),
        "manifest_sha256": digest,
        "notes": notes,
    }
