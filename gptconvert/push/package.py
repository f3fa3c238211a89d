"""The directory to upload: complete, undamaged, and verified."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptconvert.containers.json import read_json_object
from gptconvert.containers.untrusted import file_size, read_small
from gptconvert.errors import InputError, VerificationError, os_errors_as
from gptconvert.model.progress import Progress
from gptconvert.publish.checksums import MAX_SUMS, parse_sums, sha256_of_file
from gptconvert.publish.manifest import MANIFEST_FILE, SUMS_FILE
from gptconvert.publish.replaceable import INCIDENTAL, WEB_INDEX, WEB_SUMS
from gptconvert.sources.documents import MAX_BYTES as MAX_CARD
from gptconvert.targets.package.model_card import CARD_FILE

_MAX_MANIFEST = 256 << 20


@dataclass(frozen=True)
class Package:
    """An output directory that passed :func:`read_package`.

    Attributes:
        directory: its path.
        digests: relative path → SHA-256, of every file but ``SHA256SUMS``.
        sizes: relative path → bytes, of the same files.
        manifest: the content of ``manifest.json``.
        card: the content of ``README.md``, which may have been edited; empty if there is none.
        notes: what the user should know, one sentence each.
    """

    directory: str
    digests: Mapping[str, str]
    sizes: Mapping[str, int]
    manifest: Mapping[str, Any]
    card: bytes
    notes: tuple[str, ...]


def read_package(directory: str, progress: Progress) -> Package:
    """Check a directory: every file against ``SHA256SUMS``, and the manifest's record of the verification.

    Raises:
        InputError: not an output of a conversion, or files are missing, altered or not listed. Names all of them.
        VerificationError: the conversion was not verified, or an artifact failed.
    """
    if not os.path.isdir(directory):
        raise InputError("not a directory", path=directory, hint="pass the output directory of a conversion")
    missing = [name for name in (MANIFEST_FILE, SUMS_FILE) if not os.path.lexists(os.path.join(directory, name))]
    if missing:
        what = f"not the output of a conversion: {' and '.join(missing)} missing"
        raise InputError(what, path=directory, hint="convert the checkpoint, then push the output directory")
    manifest = read_json_object(os.path.join(directory, MANIFEST_FILE), _MAX_MANIFEST, MANIFEST_FILE)
    if not all(isinstance(manifest.get(key), dict) for key in ("source", "config")):
        raise InputError("not the manifest of a conversion", path=os.path.join(directory, MANIFEST_FILE))
    _check_verified(directory, manifest)
    digests, notes = _check_files(directory, manifest, progress)
    card = os.path.join(directory, CARD_FILE)
    content = read_small(card, MAX_CARD, "a model card") if CARD_FILE in digests else b""
    sizes = {name: file_size(os.path.join(directory, name)) for name in digests}
    return Package(directory, digests, sizes, manifest, content, notes)


def _check_verified(directory: str, manifest: Mapping[str, Any]) -> None:
    """Check that the manifest records a passing report for every target."""
    hint = "convert again without --no-verify, and push that output"
    report = manifest.get("verification")
    if report is None:
        raise VerificationError("the conversion was not verified", path=directory, hint=hint)
    try:
        artifacts = {str(each["path"]): (each["kind"], each["ok"] is True) for each in report["artifacts"]}
        passed, targets = report["passed"] is True, {str(target) for target in manifest["targets"]}
    except (TypeError, KeyError, AttributeError) as error:
        what = "the manifest has no report that can be read"
        raise InputError(what, path=os.path.join(directory, MANIFEST_FILE), hint=hint) from error
    failed = sorted(path for path, (_, ok) in artifacts.items() if not ok)
    unproven = sorted(targets - {kind for kind, _ in artifacts.values()})
    if failed or unproven or not passed:
        what = f"the manifest does not record that every artifact is verified: {', '.join(failed + unproven)}"
        raise VerificationError(what.removesuffix(": "), path=directory, hint=hint)


def _check_files(
    directory: str, manifest: Mapping[str, Any], progress: Progress
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The digests of all files, and notes. The model card may be edited."""
    sums = parse_sums(read_small(os.path.join(directory, SUMS_FILE), MAX_SUMS, SUMS_FILE))
    verified = _verified_digests(directory, manifest)
    present = {name for name in _names(directory) if name != SUMS_FILE}
    page = (
        {name for name in present if name == WEB_INDEX or name.startswith("web/")} if WEB_SUMS in present else set()
    )
    present -= page
    expected = {*sums.digests, *verified, MANIFEST_FILE}
    found = _digests(directory, sorted(present & expected), progress)
    problems = [f"{SUMS_FILE}: cannot be read: {line[:80]!r}" for line in sums.unreadable]
    problems += [f"{name}: missing" for name in sorted(expected - present)]
    problems += [f"{name}: not listed in {SUMS_FILE}" for name in sorted(present - sums.digests.keys())]
    unverified = sums.digests.keys() & present - verified.keys() - {MANIFEST_FILE}
    problems += [f"{name}: not listed in {MANIFEST_FILE}" for name in sorted(unverified)]
    altered = {name for name, digest in found.items() if digest != sums.digests.get(name, digest)}
    problems += [f"{name}: altered" for name in sorted(altered - {CARD_FILE})]
    # Checksums that were written again prove nothing: the report is about the files that the manifest lists.
    changed = {name for name in found.keys() & verified.keys() - altered if found[name] != verified[name]}
    problems += [f"{name}: altered after it was verified" for name in sorted(changed - {CARD_FILE})]
    if problems:
        what = "\n  ".join((f"the directory does not match its {SUMS_FILE} and {MANIFEST_FILE}", *problems))
        raise InputError(what, path=directory, hint="convert again, or restore the files")
    notes = {
        f"{CARD_FILE} was edited after {SUMS_FILE} was written": CARD_FILE in altered,
        "the page of gptconvert web is not uploaded": bool(page),
    }
    return found, tuple(note for note, applies in notes.items() if applies)


def _verified_digests(directory: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The digests of the files that the conversion wrote, by the manifest."""
    try:
        return {str(each["path"]): str(each["sha256"]) for each in manifest["files"]}
    except (TypeError, KeyError) as error:
        what = "the manifest lists no files with digests"
        raise InputError(what, path=os.path.join(directory, MANIFEST_FILE)) from error


def _names(directory: str) -> Iterator[str]:
    """Relative paths of all files, and of links to directories, which are not followed."""

    def fail(error: OSError) -> None:
        raise error

    with os_errors_as(InputError, "cannot be read", directory):
        for folder, folders, names in os.walk(directory, onerror=fail):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for name in (*names, *links):
                if name not in INCIDENTAL:
                    yield os.path.relpath(os.path.join(folder, name), directory).replace(os.sep, "/")


def _digests(directory: str, names: list[str], progress: Progress) -> dict[str, str]:
    """SHA-256 of each file."""
    paths = {name: os.path.join(directory, name) for name in names}
    sizes = {name: file_size(path) for name, path in paths.items()}
    progress.stage("checking files", sum(sizes.values()))
    found = {}
    for name, path in paths.items():
        with os_errors_as(InputError, "cannot be read", path), open(path, "rb") as file:
            found[name] = sha256_of_file(file)
        progress.advance(sizes[name])
    return found
