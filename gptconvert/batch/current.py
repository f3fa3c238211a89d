"""Whether an output is already there and right: the same source, options and versions, and undamaged."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from gptconvert.containers.json import parse_json
from gptconvert.errors import GptConvertError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.schema import SCHEMA_VERSION
from gptconvert.pipeline import recipe_of
from gptconvert.publish.checksums import MAX_SUMS, parse_sums, sha256_of_file
from gptconvert.publish.io_settings import DEFAULT_IO
from gptconvert.publish.manifest import MANIFEST_FILE, SUMS_FILE, source_record
from gptconvert.publish.source_reader import FileDigest, digest_files
from gptconvert.targets.package.model_card import CARD_FILE

#: Opens a file of an output by its relative path. Raises OSError.
Open = Callable[[str], IO[bytes]]

_MAX_MANIFEST = 256 << 20


def open_in(directory: str) -> Open:
    """Open files of a local directory."""

    def open_file(path: str) -> IO[bytes]:
        return open(os.path.join(directory, path), "rb")

    return open_file


def difference(checkpoint: Checkpoint, open_file: Open) -> str | None:
    """Why an output is not what a conversion would write now; None if it is.

    Args:
        checkpoint: the source, with the options of the conversion.
        open_file: opens files of the output.
    """
    manifest = read_manifest(open_file)
    if manifest is None:
        return f"it has no {MANIFEST_FILE} that can be read"
    found = _recipe_difference(checkpoint, manifest) or _source_difference(checkpoint, manifest)
    return found or next(damaged(manifest, open_file), None)


def read_manifest(open_file: Open) -> dict[str, Any] | None:
    """The manifest of an output; None if it cannot be read."""
    try:
        with open_file(MANIFEST_FILE) as file:
            value = parse_json(file.read(_MAX_MANIFEST), MANIFEST_FILE, "the manifest")
    except (OSError, GptConvertError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("files"), list) else None


def _recipe_difference(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> str | None:
    expected = {"schema_version": SCHEMA_VERSION, **recipe_of(checkpoint.options).as_dict()}
    for name, value in sorted(expected.items(), key=lambda item: item[0] == "libraries"):  # they follow the targets
        value, found = _plain(value), manifest.get(name)
        if value == found:
            continue
        if isinstance(value, dict) and isinstance(found, dict):
            keys = [key for key in sorted({*value, *found}) if value.get(key) != found.get(key)]
            return f"its {name} differ: {', '.join(keys)}"
        if isinstance(value, list) and isinstance(found, list):
            return f"its {name} are {', '.join(map(str, found))}, not {', '.join(map(str, value))}"
        return f"its {name} is {found!r:.80}, not {value!r:.80}"
    return _limit_difference(checkpoint.options.max_kl, manifest)


def _limit_difference(limit: float | None, manifest: Mapping[str, Any]) -> str | None:
    """Whether quality was held to a limit that is not as strict; the manifest records limits, but no figures."""
    if limit is None:
        return None
    artifacts = (manifest.get("verification") or {}).get("artifacts", ())
    limits = [each["quality"].get("max_kl") for each in artifacts if "quality" in each]
    loose = next((each for each in limits if each is None or each > limit), limit)
    return None if loose == limit else f"it was verified with --max-kl {loose}, not {limit}"


def _plain(value: object) -> object:
    """A value as it comes back from JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def _source_difference(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> str | None:
    recorded = manifest.get("source")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("files"), list):
        return "its manifest records no source"
    try:
        listed = {(each["name"], each["size"]): "sha256" in each for each in recorded["files"]}
    except (TypeError, KeyError):
        return "its manifest records no digests of the source"
    digests: dict[str, FileDigest] = {}
    for path in checkpoint.source.files:
        named = (os.path.basename(path), os.path.getsize(path))
        if named not in listed:
            return f"{named[0]} of the source has changed, or is new"
        digests |= _digest(path, sha256=listed[named])
    now = source_record(checkpoint, digests)
    changed = [key for key in sorted({*now, *recorded}) if _plain(now.get(key)) != recorded.get(key)]
    return f"the source has changed: {', '.join(changed)}" if changed else None


def _digest(path: str, *, sha256: bool) -> dict[str, FileDigest]:
    """The digest of a file, by the algorithm that its record uses."""
    settings = DEFAULT_IO if sha256 else dataclasses.replace(DEFAULT_IO, sha256_up_to=0)
    return digest_files([path], thorough=sha256, settings=settings)


def damaged(manifest: Mapping[str, Any], open_file: Open) -> Iterator[str]:
    """Files of an output that are missing, changed or not listed. The model card may be edited."""
    try:
        with open_file(SUMS_FILE) as file:
            sums, unreadable = parse_sums(file.read(MAX_SUMS))
    except OSError:
        yield f"{SUMS_FILE} is missing"
        return
    listed = {MANIFEST_FILE, *(each.get("path") for each in manifest["files"] if isinstance(each, dict))}
    if unreadable or sums.keys() != listed:
        yield f"{SUMS_FILE} lists other files than {MANIFEST_FILE}"
        return
    for name, digest in sums.items():
        try:
            with open_file(name) as file:
                same = name == CARD_FILE or sha256_of_file(file) == digest
        except OSError:
            yield f"{name} is missing"
            continue
        if not same:
            yield f"{name} was changed after it was published"
