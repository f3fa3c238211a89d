"""The flow, top to bottom: open, understand, plan, write, verify, publish. The only module that knows all rooms.

Nothing is visible at the output before everything is written, checked and on disk; a failure at any point leaves
the output as it was.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gptconvert.card import card
from gptconvert.checkpoint import Checkpoint
from gptconvert.errors import InputError, UnsupportedError, UsageError, VerificationError
from gptconvert.families import FAMILIES, Request, family_named
from gptconvert.inspection import open_checkpoint
from gptconvert.mapping import tied_pairs
from gptconvert.publish import signals
from gptconvert.publish.digest import sha256_of
from gptconvert.publish.manifest import Recipe, check_inputs_unchanged, manifest_files, snapshot
from gptconvert.publish.staging import Staging
from gptconvert.publish.writer import Written, WrittenFile, write_and_digest, write_files
from gptconvert.sources.detect import FORMATS
from gptconvert.sources.source import OpenOptions
from gptconvert.targets import TARGETS
from gptconvert.targets.plan import PlannedFile, Target, TargetOptions
from gptconvert.targets.sidecars import sidecar_files
from gptconvert.tensors import BFLOAT16
from gptconvert.tokenizer import tokenizer_files
from gptconvert.transforms import cast, take_rows

if TYPE_CHECKING:
    from gptconvert.verify import Report
    from gptconvert.verify.probes import Level

DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": BFLOAT16,
}


class Progress(Protocol):
    """Told what is going on; see ``gptconvert.cli.output.Progress``."""

    def stage(self, name: str, total: int = 0) -> None: ...
    def advance(self, count: int) -> None: ...


class Silent:
    """No progress."""

    def stage(self, name: str, total: int = 0) -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Options:
    """What to convert to, and how.

    Attributes:
        targets: names as in ``--to``.
        target: choices that change what is written.
        verify: ``default`` or ``full``; None: not at all.
        force: replace an existing output.
        allow_nonfinite: convert weights that hold NaN or infinities.
        strict: refuse what would otherwise be worth a note.
    """

    targets: tuple[str, ...] = ("onnx",)
    target: TargetOptions = field(default_factory=TargetOptions)
    verify: Level | None = "default"
    force: bool = False
    allow_nonfinite: bool = False
    strict: bool = False


@dataclass(frozen=True)
class Plan:
    """What a conversion will write, before any weight is read."""

    checkpoint: Checkpoint
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest and the card, which come last."""
        return sum(file.nbytes for file in self.files)

    def as_dict(self) -> dict[str, object]:
        """For ``--dry-run --json``."""
        return {"bytes": self.nbytes, "files": [_file_plan(file) for file in self.files], "notes": list(self.notes)}


@dataclass(frozen=True)
class Result:
    """What a conversion did."""

    output: str
    checkpoint: Checkpoint
    files: tuple[WrittenFile, ...]
    report: Report | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "output": self.output,
            "family": self.checkpoint.config.family,
            "task": self.checkpoint.config.task,
            "files": [{"path": f.path, "size": f.nbytes, "sha256": f.sha256} for f in self.files],
            "verification": None if self.report is None else self.report.as_dict(),
            "notes": list(self.notes),
        }


def plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Every file of the output but the ones that describe the others.

    Raises:
        UnsupportedError: a target cannot be written: a package is missing, or the model has no place in the format.
        InputError: there are notes, and ``options.strict``.
    """
    targets = [target_named(name) for name in dict.fromkeys(options.targets)]
    for target in targets:
        _require(target, checkpoint)
    checkpoint = stored_as(checkpoint, options.target.dtype)
    tokenizer, notes = tokenizer_files(checkpoint)
    files = [file for target in targets for file in target.plan(checkpoint, options.target)]
    paths = [file.path for file in files]
    files += sidecar_files(checkpoint, options.target, options.targets, paths, tokenizer)
    notes = (*checkpoint.notes, *notes)
    _strict(notes, options)
    return Plan(checkpoint, tuple(files), notes)


def _strict(notes: Sequence[str], options: Options) -> None:
    """Refuse what people asked to be refused."""
    if notes and options.strict:
        raise InputError(
            "\n  ".join(("there is something to note about this checkpoint, and --strict was given", *notes)),
            hint="convert without --strict if that is as it should be",
        )


def convert(
    checkpoint: Checkpoint, output: str, options: Options | None = None, *, progress: Progress | None = None
) -> Result:
    """Write, verify and publish; all of it or nothing.

    Args:
        checkpoint: from :func:`open_checkpoint`.
        output: directory to publish.
        options: what to write.
        progress: told about stages and bytes.

    Raises:
        VerificationError: an artifact does not compute what the checkpoint computes. Its ``report`` says where.
        GptConvertError: anything else that went wrong. In every case the output is as it was before.
    """
    options, progress = options or Options(), progress or Silent()
    source = checkpoint.source
    before = snapshot(source.files)
    planned = plan(checkpoint, options)
    check_tied(checkpoint)
    inputs = [*source.files, *([source.directory] if source.directory else [])]
    with signals.raising(), Staging(output, inputs=inputs, force=options.force) as staging:
        staging.require_space(planned.nbytes)
        progress.stage("writing", planned.nbytes)
        written = write_and_digest(
            staging.path,
            planned.files,
            planned.checkpoint,
            progress.advance,
            allow_nonfinite=options.allow_nonfinite,
            verified=options.verify is not None,
        )
        _strict(written.notes, options)
        report = _verified(planned, staging.path, options, progress)
        progress.stage("publishing")
        described = _describe(planned, written, staging.path, options, report)
        check_inputs_unchanged(before)
        staging.publish()
    notes = (*planned.notes, *written.notes, *(report.notes if report else ()), *staging.notes)
    return Result(output, planned.checkpoint, (*written.files, *described), report, notes)


def verify_export(
    source: str,
    artifact: str,
    *,
    level: Level = "default",
    opening: OpenOptions | None = None,
    request: Request | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check an existing export, anyone's, against its checkpoint.

    Raises:
        InputError: the source, or a file of the artifact, is damaged.
        UnsupportedError: the artifact holds nothing that can be checked.
    """
    from gptconvert.verify import find_artifacts
    from gptconvert.verify import verify as run

    checkpoint = open_checkpoint(source, opening=opening, request=request)
    check_tied(checkpoint)
    artifacts = find_artifacts(artifact)
    return run(checkpoint, artifacts, level, progress)


def _verified(planned: Plan, directory: str, options: Options, progress: Progress) -> Report | None:
    """The report on the staged files, or None if none was asked for."""
    if options.verify is None:
        return None
    from gptconvert.verify import find_artifacts
    from gptconvert.verify import verify as run

    report = run(planned.checkpoint, find_artifacts(directory), options.verify, progress)
    if not report.passed:
        error = VerificationError(
            f"the export does not compute what the checkpoint computes\n{report.table()}",
            hint="nothing was published; this is a fault of gptconvert, so please report it with the table above",
        )
        error.report = report.as_dict()
        raise error
    return report


def _describe(
    planned: Plan, written: Written, directory: str, options: Options, report: Report | None
) -> list[WrittenFile]:
    """Write the files that describe the others: card, manifest, checksums."""
    # Measured figures differ in their last digits between processors, and the output must not.
    verification = report.as_dict(figures=False) if report else {}
    about = card(planned.checkpoint, options.targets, options.target, verification, written.files)
    readme = write_files(directory, [PlannedFile.of_bytes("README.md", about)])
    recipe = Recipe(
        options.targets,
        {**dataclasses.asdict(options.target), "allow_nonfinite": options.allow_nonfinite, "verify": options.verify},
        [library for name in options.targets for library in target_named(name).libraries],
    )
    manifest = manifest_files(
        planned.checkpoint, planned.files, written, recipe, also=readme, verification=verification or None
    )
    return [*readme, *write_files(directory, manifest)]


def check_tied(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that stores a tied tensor twice with different bytes. Reads both.

    Raises:
        InputError: the configuration ties what the weights do not.
    """
    source, config = checkpoint.source, checkpoint.config
    scheme = family_named(config.family).scheme(source.scheme)
    for name, ours in tied_pairs(scheme, config, source.tensors, checkpoint.prefix):
        weight = checkpoint.weights[ours]
        copy = take_rows(source.tensors[name], [(0, weight.shape[0])])  # rows may have been cut off the embedding
        if copy.segments() == weight.segments() is not None or sha256_of(name, copy) == sha256_of(ours, weight):
            continue
        raise InputError(
            "the configuration ties this tensor to the embedding, but the weights differ",
            path=source.path,
            tensor=name,
            hint='set "tie_word_embeddings": false in config.json if the model was trained with a head of its own',
        )


def stored_as(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """The checkpoint with its weights in the storage type asked for; None keeps each as it is."""
    if dtype is None:
        return checkpoint
    weights = {name: cast(weight, DTYPES[dtype]) for name, weight in checkpoint.weights.items()}
    return dataclasses.replace(checkpoint, weights=weights)


def target_named(name: str) -> Target:
    """A target by its ``--to`` name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TARGETS:
        raise UsageError(f"no target {name!r}", expected=f"one of {', '.join(TARGETS)}", found=name)
    target: Target = importlib.import_module(TARGETS[name]).TARGET
    return target


def _require(target: Target, checkpoint: Checkpoint) -> None:
    """Refuse, before any work, a target that cannot be written."""
    for module, extra in target.requires:
        if importlib.util.find_spec(module) is None:
            raise UnsupportedError(
                f"--to {target.name} needs the package {module}",
                hint=f"pip install 'gptconvert[{extra}]'",
            )
    if target.families and checkpoint.config.family not in target.families:
        raise UnsupportedError(
            f"{checkpoint.config.family} cannot be written as {target.title}",
            expected=f"one of {', '.join(sorted(target.families))}",
            found=checkpoint.config.family,
        )


def matrix() -> dict[str, Any]:
    """What can be read and what it can become, from the registries."""
    targets = [target_named(name) for name in TARGETS]
    return {
        "sources": [{"name": f.name, "title": f.title} for f in FORMATS],
        "targets": [{"name": t.name, "title": t.title} for t in targets],
        "families": [
            {
                "name": family.name,
                "title": family.title,
                "sources": sorted({scheme.partition(":")[0] for scheme in family.read_config}),
                "targets": [t.name for t in targets if not t.families or family.name in t.families],
                "tasks": sorted(family.heads),
            }
            for family in FAMILIES
        ],
    }


def _file_plan(file: PlannedFile) -> dict[str, object]:
    """One file of a dry run: how much of it is copied as it is, and what is computed."""
    raw = [placed.tensor.nbytes for placed in file.tensors if placed.tensor.segments() is not None]
    computed = [placed.name for placed in file.tensors if placed.tensor.segments() is None]
    return {
        "path": file.path,
        "bytes": file.nbytes,
        "tensors": len(file.tensors),
        "copied_bytes": sum(raw),
        "transformed": computed,
    }
