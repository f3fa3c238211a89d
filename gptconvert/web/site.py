"""What the page must know of an export, as one document: graphs, tokenizer, settings, and how it was verified."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptconvert.containers.json import read_json_object
from gptconvert.containers.untrusted import hub_homes, links_out
from gptconvert.errors import InputError, UnsafeInputError, UnsupportedError, os_errors_as
from gptconvert.families.registry import FAMILIES
from gptconvert.generation.directory import TOKENIZER, WROTE, Exported, read_exported
from gptconvert.model.schema import SCHEMA_VERSION
from gptconvert.publish.checksums import sha256_of_file
from gptconvert.publish.manifest import MANIFEST_FILE
from gptconvert.web.libraries import described

#: Variant → suffix of its graph, which is transformers.js's. The page takes the first that is small enough.
VARIANTS: Mapping[str, str] = {"q8": "_quantized", "q4": "_q4", "fp32": "", "fp16": "_fp16"}
TOKENIZER_CONFIG = "tokenizer_config.json"
#: Settings of generation_config.json that the page has controls for.
SETTINGS = ("temperature", "top_k", "top_p")
_MAX_MANIFEST = 256 << 20


@dataclass(frozen=True)
class File:
    """A file of the export that the page fetches.

    Attributes:
        path: relative to the page.
        size: in bytes.
        sha256: its digest, which becomes part of the address: an updated file is never taken from a cache.
    """

    path: str
    size: int
    sha256: str

    def as_dict(self) -> dict[str, object]:
        """Address and size."""
        return {"url": f"{self.path}?v={self.sha256[:16]}", "size": self.size, "sha256": self.sha256}


def describe(directory: str, *, local: bool) -> dict[str, Any]:
    """The document of the page for an export.

    Args:
        directory: the export.
        local: whether the libraries are stored beside the page.

    Raises:
        InputError: the export has no graph, no tokenizer or no configuration; or a file differs from the manifest.
        UnsafeInputError: a file is not a regular one, or links out of the directory.
        UnsupportedError: the model does not generate text.
    """
    exported = read_exported(directory)
    manifest = _manifest(directory)
    task = manifest.get("config", {}).get("task", "text-generation")
    if task != "text-generation":
        raise UnsupportedError(
            "the model does not write text", path=directory, expected="text-generation", found=task
        )
    listed = {each["path"]: each for each in manifest.get("files", ())}
    variants = list(_variants(directory, manifest, listed))
    if not variants:
        names = ", ".join(f"onnx/model{suffix}.onnx" for suffix in VARIANTS.values())
        hint = "convert the checkpoint with --to onnx; --quantize q8 suits browsers best"
        raise InputError("has no ONNX graph for a browser", path=directory, expected=f"one of {names}", hint=hint)
    tokenizer = [_file(directory, name, listed) for name in (TOKENIZER, TOKENIZER_CONFIG) if _has(directory, name)]
    vocab_size = exported.vocab_size or len(exported.tokenizer)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": _name(manifest, exported),
        "context": exported.n_ctx,
        "start": _start(exported),
        "stops": list(exported.special.stops(vocab_size)),
        "defaults": _defaults(exported),
        "tokenizer": [each.as_dict() for each in tokenizer],
        "variants": variants,
        "source": _source(manifest),
        "libraries": described(local=local),
    }


def _manifest(directory: str) -> dict[str, Any]:
    """The manifest; empty if another program wrote the export."""
    if not _has(directory, MANIFEST_FILE):
        return {}
    path = os.path.join(directory, MANIFEST_FILE)
    manifest: dict[str, Any] = read_json_object(path, _MAX_MANIFEST, "the manifest")
    files, config = manifest.get("files"), manifest.get("config")
    fits = isinstance(files, list) and all(
        isinstance(f, dict) and {"path", "size", "sha256"} <= f.keys() for f in files
    )
    if not fits or not isinstance(config, dict):
        raise InputError("is not a manifest of gptconvert", path=path, hint=WROTE)
    return manifest


def _variants(
    directory: str, manifest: Mapping[str, Any], listed: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, object]]:
    for name, suffix in VARIANTS.items():
        graph = f"onnx/model{suffix}.onnx"
        if not _has(directory, graph):
            continue
        files = [_file(directory, path, listed) for path in (graph, *_data(directory, graph))]
        yield {
            "name": name,
            "graph": files[0].as_dict(),
            "data": [{"path": os.path.basename(each.path), **each.as_dict()} for each in files[1:]],
            "size": sum(each.size for each in files),
            "verified": _verified(manifest, graph),
        }


def _data(directory: str, graph: str) -> list[str]:
    """The files of external data: ``GRAPH_data``, ``GRAPH_data_1`` …"""
    folder, name = os.path.split(graph)
    pattern = re.compile(re.escape(f"{name}_data") + r"(?:_(\d+))?")
    with os_errors_as(InputError, "cannot be read", folder):
        matches = [
            match for each in os.listdir(os.path.join(directory, folder)) if (match := pattern.fullmatch(each))
        ]
    return [f"{folder}/{match[0]}" for match in sorted(matches, key=lambda match: int(match[1] or 0))]


def _verified(manifest: Mapping[str, Any], graph: str) -> dict[str, object] | None:
    """What the manifest records of a graph's verification; None if it does not, or not that it passed."""
    artifacts = (manifest.get("verification") or {}).get("artifacts", ())
    found = next((each for each in artifacts if each.get("path") == graph), None)
    if found is None or not found.get("ok"):
        return None
    groups = [group for run in found.get("runs", ()) for group in run.get("groups", ())]
    return {
        "groups": len(groups),
        "weights": found.get("weights", {}).get("equal") if isinstance(found.get("weights"), dict) else None,
        "max_kl": (found.get("quality") or {}).get("max_kl"),
    }


def _source(manifest: Mapping[str, Any]) -> dict[str, object] | None:
    """What was converted, and by which version."""
    source = manifest.get("source")
    if not isinstance(source, dict):
        return None
    tool = manifest.get("tool", {})
    return {
        "format": source.get("format"),
        "repo": source.get("repo"),
        "revision": source.get("revision"),
        "tool": f"{tool.get('name')} {tool.get('version')}",
    }


def _name(manifest: Mapping[str, Any], exported: Exported) -> str:
    """Name of the model: its repository's, else its family's."""
    repo = (manifest.get("source") or {}).get("repo")
    if isinstance(repo, str):
        return repo.rpartition("/")[2]
    model_type = str(exported.config.get("model_type", "a GPT"))
    family = next((each for each in FAMILIES if each.name == manifest.get("config", {}).get("family")), None)
    return model_type if family is None else family.title.partition(",")[0]


def _start(exported: Exported) -> list[int]:
    """The ids of an empty text: the token that starts a text, else one that ends it."""
    return [each for each in (exported.special.bos, *exported.special.eos) if each is not None][:1]


def _defaults(exported: Exported) -> dict[str, Any]:
    """Settings of generation_config.json, if it asks for sampling."""
    stated = exported.defaults
    return {name: stated[name] for name in SETTINGS if name in stated} if stated.get("do_sample") else {}


def _has(directory: str, name: str) -> bool:
    path = os.path.join(directory, name)
    if not os.path.lexists(path):
        return False
    if links_out(path, hub_homes(directory)):
        raise UnsafeInputError("links out of the directory", path=path, found=os.path.realpath(path))
    return True


def _file(directory: str, name: str, listed: Mapping[str, Mapping[str, Any]]) -> File:
    """A file with its digest.

    Raises:
        InputError: it is not the one in the manifest, so what the manifest says of it is not true.
    """
    path = os.path.join(directory, name)
    if not _has(directory, name):
        raise InputError("is missing", path=path)
    with os_errors_as(InputError, "cannot be read", path), open(path, "rb") as file:
        digest, size = sha256_of_file(file), file.tell()
    expected = listed.get(name, {}).get("sha256")
    if expected not in (None, digest):
        raise InputError(
            "was changed after it was published",
            path=path,
            expected=f"SHA-256 {expected}, as in manifest.json",
            found=digest,
            hint="convert the checkpoint again, or remove manifest.json, which no longer describes the export",
        )
    return File(name, size, digest)
