"""``manifest.json`` and ``SHA256SUMS`` of a published directory, and the check for changed inputs.

Both files are reproducible: they contain no dates, directories or host names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from gptconvert.containers.json import dump_json
from gptconvert.errors import InputError, os_errors_as
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import PlannedFile
from gptconvert.model.names import collapse
from gptconvert.model.schema import SCHEMA_VERSION
from gptconvert.model.source import Source
from gptconvert.publish import journal
from gptconvert.publish.checksums import dump_sums
from gptconvert.publish.source_reader import FileDigest
from gptconvert.publish.writer import Written, WrittenFile
from gptconvert.version import __version__

MANIFEST_FILE, SUMS_FILE = "manifest.json", "SHA256SUMS"


@dataclass(frozen=True)
class Recipe:
    """The parameters of a conversion.

    Attributes:
        targets: as in ``--to``.
        options: every option that affects the output, including source options: ``Options.recorded()``.
        libraries: installed distributions whose version can affect the bytes (``onnx``, ``tokenizers`` …).
    """

    targets: Iterable[str]
    options: Mapping[str, object]
    libraries: Iterable[str] = ()

    def as_dict(self) -> dict[str, object]:
        """The parts of a manifest that decide the bytes of the output, besides the source."""
        return {
            "tool": {"name": "gptconvert", "version": __version__},
            "libraries": {name: metadata.version(name) for name in self.libraries},
            "targets": sorted(self.targets),
            "options": dict(self.options),
        }


def manifest_files(
    checkpoint: Checkpoint,
    planned: Iterable[PlannedFile],
    written: Written,
    recipe: Recipe,
    *,
    also: Sequence[WrittenFile] = (),
    verification: Mapping[str, object] | None = None,
) -> tuple[PlannedFile, PlannedFile]:
    """``manifest.json``, and ``SHA256SUMS`` of all files including the manifest, for ``sha256sum -c``.

    Args:
        checkpoint: the exported checkpoint.
        planned: the planned files that contain tensors.
        written: the record of the written files.
        recipe: targets, options and libraries.
        also: other published files (a model card, files written by other programs).
        verification: the report; None if not verified.

    Raises:
        ValueError: ``verification`` or an option contains NaN or an infinity.
    """
    files = sorted((*written.files, *also), key=lambda file: file.path)
    content = {
        "schema_version": SCHEMA_VERSION,
        **recipe.as_dict(),
        "source": source_record(checkpoint, written.sources),
        "config": checkpoint.config.as_dict(),
        "special_ids": dataclasses.asdict(checkpoint.special_ids),
        "files": [{"path": f.path, "size": f.nbytes, "sha256": f.sha256} for f in files],
        "tensors": _tensors(planned, written.tensors),
        "verification": None if verification is None else dict(verification),
    }
    manifest = PlannedFile.of_bytes(MANIFEST_FILE, dump_json(content))
    return manifest, PlannedFile.of_bytes(SUMS_FILE, _sums(files, manifest))


def source_record(checkpoint: Checkpoint, digests: Mapping[str, FileDigest]) -> dict[str, object]:
    """What was converted, as plain values without local paths."""
    source = checkpoint.source
    files = [(os.path.basename(path), digest) for path, digest in digests.items()]
    return {
        "format": source.format,
        "scheme": source.scheme,
        "repo": source.repo,
        "revision": source.revision,
        **_adapter(source),
        "prefix": checkpoint.prefix,
        "files": [
            {"name": name, "size": digest.nbytes, digest.algorithm: digest.value}
            for name, digest in sorted(files, key=lambda pair: (pair[0], pair[1].value))
        ],
        "dropped": sorted(collapse(checkpoint.dropped)),
    }


def _adapter(source: Source) -> dict[str, object]:
    """The adapter's repository and commit, if one was merged."""
    adapter = source.adapter
    return {} if adapter is None else {"adapter": {"repo": adapter.repo, "revision": adapter.revision}}


def _tensors(planned: Iterable[PlannedFile], digests: Mapping[tuple[str, str], str]) -> list[dict[str, object]]:
    placed = [(file.path, tensor) for file in planned for tensor in file.tensors]
    return [
        {
            "file": path,
            "name": tensor.name,
            "dtype": tensor.tensor.dtype.newbyteorder("=").name,
            "shape": list(tensor.tensor.shape),
            "sha256": digests.get((path, tensor.name)),
        }
        for path, tensor in sorted(placed, key=lambda pair: (pair[0], pair[1].name))
    ]


def _sums(files: Iterable[WrittenFile], manifest: PlannedFile) -> bytes:
    sums = {file.path: file.sha256 for file in files} | {manifest.path: hashlib.sha256(manifest.head).hexdigest()}
    return dump_sums(sums)


@dataclass(frozen=True)
class FileState:
    """File metadata that changes when a file is written to or replaced, even if its ``mtime`` is set back."""

    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def snapshot(paths: Iterable[str]) -> dict[str, FileState | None]:
    """The state of every path; None if it does not exist.

    Raises:
        InputError: it cannot be determined.
    """
    found: dict[str, FileState | None] = {}
    for path in paths:
        with os_errors_as(InputError, "cannot be read", path):
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                found[path] = None
            else:
                found[path] = FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return found


def record_reading(states: Mapping[str, FileState | None]) -> None:
    """Record the files being read, to explain the death of this process if one of them is truncated meanwhile."""
    journal.record("reading", {path: state and dataclasses.astuple(state) for path, state in states.items()})


def changed_since(recorded: Mapping[str, Sequence[int] | None]) -> list[str]:
    """The files whose state is not the one given to :func:`record_reading`."""
    now = snapshot(recorded)
    return [path for path, state in recorded.items() if now[path] != (state and FileState(*state))]


def check_inputs_unchanged(
    before: Mapping[str, FileState | None], after: Mapping[str, FileState | None] | None = None
) -> None:
    """Check that the inputs did not change during the conversion.

    Args:
        before: :func:`snapshot` taken before the first read.
        after: snapshot taken after the last read; None to take it now.

    Raises:
        InputError: files changed. Lists all of them.
    """
    after = snapshot(before) if after is None else after
    changed = [path for path, state in before.items() if after.get(path) != state]
    if changed:
        raise changed_error(changed)


def changed_error(paths: Sequence[str]) -> InputError:
    """The error for inputs that changed during the run."""
    return InputError(
        f"input changed while it was being read: {', '.join(sorted(map(os.path.basename, paths)))}",
        path=paths[0],
        hint="wait for the training run or download that writes it to finish, then convert again",
    )
