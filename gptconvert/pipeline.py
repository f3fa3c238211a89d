"""The flow, top to bottom: open, plan, write, verify, describe, publish. Only this module uses every package.

Nothing appears at the output path until everything is written, verified and synced to disk; a failure at any point
leaves the output unchanged.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptconvert.containers.untrusted import boundary
from gptconvert.errors import (
    InputError,
    OutputError,
    UnsupportedError,
    VerificationError,
    reason_and_file,
)
from gptconvert.families.registry import FAMILIES, family_named
from gptconvert.inspection import open_checkpoint, summary
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.encodings import QUANTISED
from gptconvert.model.export import Export, PlannedFile
from gptconvert.model.options import Options, as_options
from gptconvert.model.progress import Progress, Silent
from gptconvert.model.resolution import tied_pairs
from gptconvert.model.transforms import take_rows
from gptconvert.publish import signals
from gptconvert.publish.manifest import (
    MANIFEST_FILE,
    SUMS_FILE,
    Recipe,
    check_inputs_unchanged,
    manifest_files,
    record_reading,
    snapshot,
    source_record,
)
from gptconvert.publish.replaceable import deletion_notes
from gptconvert.publish.source_scan import sha256_of
from gptconvert.publish.staging import Staging
from gptconvert.publish.writer import Written, WrittenFile, write_and_digest, write_files
from gptconvert.quality import evaluation_of
from gptconvert.sources.detect import FORMATS
from gptconvert.targets.onnx.variants import HALF
from gptconvert.targets.package.model_card import CARD_FILE, model_card
from gptconvert.targets.package.sidecars import sidecar_files, with_special_ids
from gptconvert.targets.package.tokenizer import tokenizer_files
from gptconvert.targets.registry import TARGETS, target_named, targets_for
from gptconvert.targets.target import CardFacts

if TYPE_CHECKING:
    from gptconvert.verify.report import Report


#: Files written last, because they describe the others.
DESCRIBED = (CARD_FILE, MANIFEST_FILE, SUMS_FILE)


@dataclass(frozen=True)
class Plan:
    """What a conversion will write, known before any weight is read.

    Attributes:
        checkpoint: as opened.
        options: the user's choices.
        exports: the artifacts.
        package: configuration and tokenizer files beside them.
        notes: what the user should know, one sentence each.
    """

    checkpoint: Checkpoint
    options: Options
    exports: tuple[Export, ...]
    package: tuple[PlannedFile, ...]
    notes: tuple[str, ...]

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """All files except the model card, the manifest and the checksums, which are written last."""
        return (*(file for export in self.exports for file in export.files), *self.package)

    @property
    def nbytes(self) -> int:
        """Total size of :attr:`files` in bytes."""
        return sum(file.nbytes for file in self.files)

    def as_dict(self) -> dict[str, object]:
        """The output of ``--dry-run --json``. The files that describe the others have no size yet."""
        described: list[dict[str, object]] = [
            {"path": path, "size": None, "tensors": 0, "copied": 0, "transformed": []} for path in DESCRIBED
        ]
        files = [*(_file_plan(file) for file in self.files), *described]
        return {"size": self.nbytes, "files": files, "notes": list(self.notes)}

    def __repr__(self) -> str:
        return f"<Plan: {', '.join(export.path for export in self.exports)}, {len(self.files)} files>"

    def _repr_html_(self) -> str:
        """The plan in a notebook."""
        from gptconvert.reporting.html import fragment

        return fragment({**summary(self.checkpoint), "command": "plan", "ok": True, **self.as_dict()})


@dataclass(frozen=True)
class Result:
    """The result of a conversion.

    Attributes:
        output: the published directory.
        checkpoint: as exported.
        files: every file in the directory, with size and digest.
        report: the verification report, or None if verification was skipped.
        notes: what the user should know, one sentence each.
        source: what was converted, with the digests of its files, as in manifest.json.
    """

    output: str
    checkpoint: Checkpoint
    files: tuple[WrittenFile, ...]
    report: Report | None
    notes: tuple[str, ...]
    source: Mapping[str, object]

    def __repr__(self) -> str:
        verdict = "not verified" if self.report is None else "verified"
        return f"<Result {self.output!r}: {self.checkpoint.config.family}, {len(self.files)} files, {verdict}>"

    def _repr_html_(self) -> str:
        """The verdict, charts and figures in a notebook."""
        from gptconvert.reporting.html import fragment

        return fragment({**summary(self.checkpoint), "command": "convert", "ok": True, **self.as_dict()})

    def as_dict(self) -> dict[str, object]:
        """The output of ``--json``."""
        return {
            "output": self.output,
            "family": self.checkpoint.config.family,
            "task": self.checkpoint.config.task,
            "source": dict(self.source),
            "files": [{"path": f.path, "size": f.nbytes, "sha256": f.sha256} for f in self.files],
            "verification": None if self.report is None else self.report.as_dict(),
            "notes": list(self.notes),
        }


def plan(checkpoint: Checkpoint | str | os.PathLike[str], options: Options | None = None) -> Plan:
    """Plan every output file, except those that describe the others.

    Args:
        checkpoint: from :func:`open_checkpoint`, or any source that it accepts.
        options: what to write; None for the options that the checkpoint was opened with.

    Raises:
        UsageError: an option has no effect with these targets, or contradicts the options of :func:`open_checkpoint`.
        UnsupportedError: a target cannot be written: a package is missing, or the format cannot store the model.
        InputError: the checkpoint has notes, and ``options.strict`` is set.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint, options = open_checkpoint(checkpoint, options), None
    options = checkpoint.options if options is None else as_options(options).opened_with(checkpoint.options)
    targets = targets_for(options.targets, checkpoint)
    options.check_targets()
    with boundary(checkpoint.source.path, "a tokenizer"):
        tokenizer, notes = tokenizer_files(checkpoint)
    checkpoint = with_special_ids(checkpoint, tokenizer)
    exports = tuple(export for target in targets for export in target.plan(checkpoint, options))
    notes = (*checkpoint.notes, *notes, *(note for export in exports for note in export.notes))
    _refuse_notes(notes, options)
    return Plan(checkpoint, options, exports, sidecar_files(exports, options, tokenizer), notes)


def check_output(planned: Plan, output: str | os.PathLike[str]) -> tuple[str, ...]:
    """Check that a plan could be published at ``output``; write nothing. Returns notes about what it would replace.

    Raises:
        OutputError: the output is refused, or the files would not fit.
        InputError: there are notes, and ``strict`` is set.
    """
    staging = Staging(output, inputs=_inputs(planned.checkpoint), force=planned.options.force)
    staging.require_space(planned.nbytes)
    notes = deletion_notes(staging.output)
    _refuse_notes(notes, planned.options)
    return notes


def _inputs(checkpoint: Checkpoint) -> list[str]:
    """The files and directories that an output must not replace."""
    source = checkpoint.source
    return [*source.files, *([source.directory] if source.directory else [])]


def _refuse_notes(notes: Sequence[str], options: Options) -> None:
    """Treat notes as errors if ``options.strict`` is set."""
    if notes and options.strict:
        raise InputError(
            "\n  ".join(("there are notes, which --strict treats as errors", *notes)),
            hint="run without --strict if the notes are acceptable",
        )


def convert(
    checkpoint: Checkpoint | str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> Result:
    """Write, verify and publish a checkpoint: all of it or nothing.

    Weights are memory-mapped in this process. If another program truncates a source file meanwhile, or its disk
    fails, the kernel kills the process (SIGBUS); on Linux, the command line runs this function in a child process to
    survive that. A process killed by SIGBUS or SIGKILL leaves a hidden directory and a lock file beside the output,
    which do no harm; the next run with the same output removes them.

    Args:
        checkpoint: from :func:`open_checkpoint`, or any source that it accepts.
        output: directory to publish.
        options: what to write; None for the options that the checkpoint was opened with.
        progress: receives stages and bytes.

    Raises:
        VerificationError: an artifact does not compute what the checkpoint computes. Its ``report`` shows where.
        GptConvertError: any other failure. In every case the output is left unchanged.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint, options = open_checkpoint(checkpoint, options), None
    progress, source, output = progress or Silent(), checkpoint.source, os.fsdecode(output)
    before = snapshot(source.files)
    record_reading(before)
    planned = plan(checkpoint, options)
    options = planned.options
    if options.verify is not None:
        require_torch("or convert with --no-verify")
    check_tied(checkpoint)
    with (
        signals.raising(),
        _os_errors(checkpoint, output),
        Staging(output, inputs=_inputs(checkpoint), force=options.force) as staging,
    ):
        staging.require_space(planned.nbytes)
        deleted = deletion_notes(staging.output)
        _refuse_notes(deleted, options)
        progress.stage("writing", planned.nbytes)
        written = write_and_digest(
            staging.path,
            planned.files,
            checkpoint,
            progress.advance,
            allow_nonfinite=options.allow_nonfinite,
            verified=options.verify is not None,
        )
        _refuse_notes(written.notes, options)
        source_files = source_record(checkpoint, written.sources)
        try:
            report = _verified(planned, staging.path, progress)
        except VerificationError as error:
            error.source = source_files
            raise
        _refuse_notes(report.notes if report else (), options)
        progress.stage("publishing")
        described = _describe(planned, written, staging.path, report)
        check_inputs_unchanged(before)
        staging.publish()
    notes = (*planned.notes, *deleted, *written.notes, *(report.notes if report else ()), *staging.notes)
    files = (*written.files, *described)
    return Result(output, planned.exports[0].checkpoint, files, report, notes, source_files)


@contextmanager
def _os_errors(checkpoint: Checkpoint, output: str) -> Iterator[None]:
    """Convert the :class:`OSError` that nothing else has: of an input if it names one, otherwise of the output."""
    try:
        yield
    except OSError as error:
        name = "" if error.filename is None else os.path.abspath(os.fsdecode(error.filename))
        for path in _inputs(checkpoint):
            if (name + os.sep).startswith(os.path.abspath(path) + os.sep):
                raise InputError(f"cannot be read ({reason_and_file(error, path)})", path=path) from error
        raise OutputError(f"cannot be written ({reason_and_file(error, output)})", path=output) from error


def verify_export(
    source: str | os.PathLike[str],
    artifact: str | os.PathLike[str],
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """Verify an existing export, made by any tool, against its checkpoint.

    Args:
        source: the checkpoint: a local path or a hub repository.
        artifact: a directory or graph file.
        options: how to open the source, how thoroughly to verify, and the text that quality is measured on.
        progress: receives stages.

    Raises:
        InputError: the source, or a file of the artifact, is damaged; or there are notes, and ``options.strict`` is
            set.
        UnsupportedError: nothing in the artifact can be verified.
    """
    require_torch()
    from gptconvert.targets.foreign import find_candidates
    from gptconvert.targets.package.verify import verify_package
    from gptconvert.targets.verification import verify

    options, artifact = as_options(options), os.fsdecode(artifact)
    checkpoint = with_special_ids(open_checkpoint(source, options))
    record_reading(snapshot([*checkpoint.source.files, *_files_of(artifact)]))
    evaluation = evaluation_of(checkpoint, options)
    with boundary(artifact, "an export"):
        found = find_candidates(checkpoint, artifact, options.seed)
        candidates = [dataclasses.replace(candidate, evaluation=evaluation) for candidate in found]
        package = verify_package(checkpoint, artifact) if os.path.isdir(artifact) else None
        check_tied(checkpoint)
        report = verify(candidates, options.verify or "default", progress)
    report.package = package
    if report.passed:
        _refuse_notes((*checkpoint.notes, *report.notes), options)
    return report


def _files_of(artifact: str) -> list[str]:
    """The files of an artifact, which may be one file."""
    found = [os.path.join(folder, name) for folder, _, names in os.walk(artifact) for name in names]
    return found or [artifact]


def require_torch(otherwise: str = "") -> None:
    """Check that PyTorch, which computes the truth, is installed; do not import it.

    Raises:
        UnsupportedError: it is not. ``otherwise`` ends the hint.
    """
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError(
            "verification needs the Python package torch, which is not installed",
            hint=", ".join(filter(None, ("pip install torch", otherwise))),
        )


def _verified(planned: Plan, directory: str, progress: Progress) -> Report | None:
    """Verify the staged files; None if verification is skipped.

    Raises:
        VerificationError: an export did not pass.
    """
    if planned.options.verify is None:
        return None
    from gptconvert.targets.verification import verify_exports

    options = planned.options
    report = verify_exports(
        planned.exports,
        directory,
        options.verify or "default",
        progress,
        seed=options.seed,
        evaluation=evaluation_of(planned.checkpoint, options, planned.package),
    )
    if not report.passed:
        raise _failure(report)
    return report


def _failure(report: Report) -> VerificationError:
    """The error of a failed verification, with its table and report."""
    message = "the export does not compute what the checkpoint computes"
    hint = "nothing was published; this is a bug in gptconvert, so please report it with the table above"
    if report.misses_limit:
        message = "quantisation loses more than --max-kl allows"
        missed = dict.fromkeys(artifact.kind for artifact in report.artifacts if not artifact.ok)
        better = ", or ".join(target_named(kind).loses_less for kind in missed)
        hint = f"nothing was published; try {better}, or accept it: --max-kl X"
    error = VerificationError(f"{message}\n{report.table()}", hint=hint)
    error.report = report.as_dict()
    return error


def _describe(planned: Plan, written: Written, directory: str, report: Report | None) -> list[WrittenFile]:
    """Write the files that describe the others: card, manifest, checksums."""
    # Measured figures differ in the last digits between processors, but the output must not.
    verification = report.as_dict(figures=False) if report else {}
    checkpoint, options = planned.exports[0].checkpoint, planned.options
    facts = CardFacts(checkpoint, planned.exports, options, {file.path: file.nbytes for file in written.files})
    readme = write_files(directory, [PlannedFile.of_bytes(CARD_FILE, model_card(facts, verification))])
    manifest = manifest_files(
        checkpoint,
        planned.files,
        written,
        recipe_of(options),
        also=readme,
        verification=verification or None,
    )
    return [*readme, *write_files(directory, manifest)]


def recipe_of(options: Options) -> Recipe:
    """The parameters of a conversion with these options, as its manifest records them."""
    libraries = [library for name in options.targets for library in target_named(name).libraries]
    return Recipe(options.targets, options.recorded(), libraries)


def check_tied(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that stores a tied tensor twice with different bytes. Reads both copies.

    Raises:
        InputError: the configuration ties two tensors that differ.
    """
    source, config = checkpoint.source, checkpoint.config
    scheme = family_named(config.family).scheme(source.scheme)
    for name, canonical in tied_pairs(scheme, config, source.tensors, checkpoint.prefix):
        weight = checkpoint.weights[canonical]
        copy = take_rows(source.tensors[name], [(0, weight.shape[0])])  # the embedding may have been trimmed
        if copy.segments() == weight.segments() is not None or sha256_of(name, copy) == sha256_of(canonical, weight):
            continue
        raise InputError(
            "the configuration ties this tensor to the embedding, but the weights differ",
            path=source.path,
            item=name,
            hint="transformers 5 uses the separate head: pass --set tie_word_embeddings=false; transformers 4 uses "
            f"the embedding: pass --ignore-tensor {name}"
            if source.scheme == "hf"
            else f"to use the embedding, pass --ignore-tensor {name}",
        )


def matrix() -> dict[str, Any]:
    """Supported sources, targets, quantised graphs and families, from the registries."""
    targets, command = [target_named(name) for name in TARGETS], {f.name: f.command for f in FORMATS}
    return {
        "sources": [{"name": f.name, "command": f.command, "title": f.title} for f in FORMATS],
        "targets": [{"name": t.name, "title": t.title} for t in targets],
        "variants": [
            *({"name": q.option, "file": f"model_{q.variant}.onnx", "title": q.title} for q in QUANTISED.values()),
            {"name": HALF, "file": f"model_{HALF}.onnx", "title": "computes in float16"},
        ],
        "families": [
            {
                "name": family.name,
                "title": family.title,
                "sources": sorted({command[scheme.name.partition(":")[0]] for scheme in family.schemes}),
                "targets": [t.name for t in targets if not t.families or family.name in t.families],
                "tasks": sorted(family.heads),
            }
            for family in FAMILIES
        ],
    }


def _file_plan(file: PlannedFile) -> dict[str, object]:
    """One file of a dry run: its size, the bytes copied unchanged, and the names of the tensors computed."""
    raw = [placed.tensor.nbytes for placed in file.tensors if placed.tensor.segments() is not None]
    computed = [placed.name for placed in file.tensors if placed.tensor.segments() is None]
    return {
        "path": file.path,
        "size": file.nbytes,
        "tensors": len(file.tensors),
        "copied": sum(raw),
        "transformed": computed,
    }
