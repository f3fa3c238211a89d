"""Compare the small files of an existing export with those that the checkpoint would give.

The graph and the weights may be right while the files beside them make other programs use them wrongly: a
configuration of another size, a tokenizer with other ids, an end token that generation never meets. A file that the
directory lacks is not required.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gptconvert.containers.json import read_json_object
from gptconvert.containers.untrusted import boundary, file_size, read_small
from gptconvert.errors import GptConvertError, is_unreadable, short_repr
from gptconvert.families.registry import family_named
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.config_table import USUAL, Reading
from gptconvert.model.generation import GENERATION_CONFIG, GENERATION_DEFAULTS, special_ids
from gptconvert.publish.checksums import MAX_SUMS, parse_sums, sha256_of_file
from gptconvert.publish.manifest import MANIFEST_FILE, SUMS_FILE
from gptconvert.targets.package.model_card import CARD_FILE
from gptconvert.targets.package.sidecars import genai_config
from gptconvert.targets.package.tokenizer import parse_merges, tokenizer_files
from gptconvert.targets.package.tokenizer_kinds import MAX_BYTES, MAX_VALUES
from gptconvert.targets.package.tokenizer_process import RemoteTokenizer, TokenizerProcess
from gptconvert.verify.report import PackageReport

MAX_JSON_BYTES = 16 << 20
CONFIG, GENAI_CONFIG = "config.json", "genai_config.json"
#: Text on which tokenizers must agree: words, spaces, digits, scripts, emoji, code, control characters.
CORPUS = (
    "Objects are never explicitly destroyed; however, they may be garbage-collected.",
    "  leading, trailing and    inner spaces \n\n\tand tabs\r\n",
    "I'll we've CAN'T it's 1234567 3.14 10,000",
    "naïve café – “quotes” … Straße İstanbul",
    "Ελληνικά русский עברית العربية हिन्दी 中文 日本語 한국어",
    "👩‍👩‍👧 🇪🇺 e\u0301 \u200b\ufeff",
    "def f(x):\n    return {'a': x[0] != 1}  # comment\n",
    "<|endoftext|><unk></s>[CLS]",
    "\x00\x7f",
)
#: Bytes of a directory: so many copies of the weights, in all targets and variants, and so much beside them.
MOST_COPIES, MOST_BESIDE = 32, 4 << 30


def verify_package(checkpoint: Checkpoint, directory: str) -> PackageReport:
    """Compare ``directory``'s SHA256SUMS, configuration and tokenizer with its files and the checkpoint.

    Args:
        checkpoint: the original, with the special ids of its tokenizer.
        directory: an export, by this program or another.
    """
    report = PackageReport()
    if os.path.exists(os.path.join(directory, SUMS_FILE)):
        most = MOST_COPIES * checkpoint.nbytes + MOST_BESIDE
        _collect(report, SUMS_FILE, _sums(directory, report, most))
    for name, differences in CHECKS.items():
        path = os.path.join(directory, name)
        if os.path.exists(path):
            _collect(report, name, differences(checkpoint, path))
    return report


def _collect(report: PackageReport, name: str, differences: Iterator[str]) -> None:
    """Add a file's differences; a file that is missing or malformed is one too.

    Raises:
        InputError: the operating system cannot read it.
    """
    report.files.append(name)
    try:
        with boundary(name, "part of an export"):
            report.problems += [f"{name}: {difference}" for difference in differences]
    except GptConvertError as error:
        if is_unreadable(error):
            raise
        error.path = None
        report.problems.append(f"{name}: {error}")


def _sums(directory: str, report: PackageReport, most: int) -> Iterator[str]:
    """Files that do not have their checksum; at most ``most`` bytes are read, since links can list a file often."""
    sums = parse_sums(read_small(os.path.join(directory, SUMS_FILE), MAX_SUMS, "checksums"))
    for line in sums.unreadable:
        yield f"cannot be read: {line[:80]!r}"
    for name, digest in sums.digests.items():
        path = os.path.join(directory, name)
        if not os.path.exists(path):
            yield f"lists {name}, which is missing"
            continue
        most -= file_size(path)
        if most < 0:
            yield f"lists files that are too large for an export of this model, {name} among them"
            return
        with open(path, "rb") as file:
            found = sha256_of_file(file)
        if found != digest:
            if name == CARD_FILE:
                report.notes.append(f"{name} was edited after {SUMS_FILE} was written")
            else:
                yield f"{name} was changed after it was published"


def _config(checkpoint: Checkpoint, path: str) -> Iterator[str]:
    """Keys of config.json whose values describe another model."""
    family, raw = family_named(checkpoint.config.family), read_json_object(path, MAX_JSON_BYTES, CONFIG)
    if raw.get("model_type") not in family.model_types:
        yield _differs("model_type", raw.get("model_type"), family.model_types[0])
        return
    written = family.write_config(checkpoint.config, {})
    # Without tensors, which would excuse a wrong key.
    own, found = (_facts(family.read_keys(each, None, {})[0], family.common) for each in (written, raw))
    named = {key.field: key.name for key in family.keys.keys if key.field is not None}
    differing = [name for name in own if own[name] != found.get(name) and not name.endswith("_token_id")]
    keyed = [name for name in differing if name in named]
    # Derived values differ because keys do.
    for name in keyed or differing:
        yield _differs(named.get(name, name), found.get(name), own[name])
    if not os.path.exists(os.path.join(os.path.dirname(path), GENERATION_CONFIG)):
        yield from _ids(checkpoint, raw)


def _facts(reading: Reading, common: Mapping[str, object]) -> dict[str, Any]:
    """The values of a configuration, and those derived from them."""
    known = {**common, **reading.values}
    return {**known, **{name: derive(known) for name, derive in {**USUAL, **reading.table.derived}.items()}}


def _generation(checkpoint: Checkpoint, path: str) -> Iterator[str]:
    """Special ids, and settings that the source states."""
    raw = read_json_object(path, MAX_JSON_BYTES, GENERATION_CONFIG)
    yield from _ids(checkpoint, raw)
    for key, value in checkpoint.generation.items():
        if not key.endswith("_token_id") and key not in ("transformers_version", "_from_model_config", "use_cache"):
            found = raw.get(key, GENERATION_DEFAULTS.get(key))
            if found != value:
                yield _differs(key, found, value)


def _ids(checkpoint: Checkpoint, raw: Mapping[str, object]) -> Iterator[str]:
    """Special ids of a generating model that differ from the checkpoint's."""
    if checkpoint.config.task != "text-generation":
        return
    own, found = checkpoint.special_ids.as_json(), special_ids((raw, None)).as_json()
    for key in own | found:
        if key == "pad_token_id" and key not in own:
            continue  # exporters add one, which changes nothing that is generated
        if own.get(key) != found.get(key):
            yield _differs(key, found.get(key), own.get(key))


def _tokenizer(checkpoint: Checkpoint, path: str) -> Iterator[str]:
    """Text to which a tokenizer.json gives other ids than the checkpoint's tokenizer."""
    expected = tokenizer_files(checkpoint)[0].get("tokenizer.json")
    if expected is None:
        return
    data = read_small(path, MAX_BYTES, "tokenizer")
    with TokenizerProcess(path, len(expected) + len(data)) as process:
        own, found = process.load(expected, "the checkpoint's tokenizer.json"), process.load(data, path)
        yield from _differing_texts(own, found)
        if own.size != found.size:
            yield _differs("the number of tokens", found.size, own.size)


def _differing_texts(own: RemoteTokenizer, found: RemoteTokenizer) -> Iterator[str]:
    for text in CORPUS:
        expected_ids, found_ids = own.encode(text), found.encode(text)
        if expected_ids != found_ids:
            both = zip(expected_ids, found_ids, strict=False)
            at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(expected_ids), len(found_ids)))
            yield (
                f"{text[:24]!r} gives other ids than the checkpoint's tokenizer, from token {at}: "
                f"{found_ids[at : at + 4]}, expected {expected_ids[at : at + 4]}"
            )
        elif own.decode(expected_ids, special=False) != found.decode(expected_ids, special=False):
            yield f"decodes the ids of {text[:24]!r} to other text than the checkpoint's tokenizer"


def _vocabulary(checkpoint: Checkpoint, path: str) -> Iterator[str]:
    expected = tokenizer_files(checkpoint)[0].get("vocab.json")
    if expected is not None:
        own, found = json.loads(expected), read_json_object(path, MAX_BYTES, "vocabulary", MAX_VALUES)
        differing = [token for token in own | found if own.get(token) != found.get(token)]
        if differing:
            token = differing[0]
            yield f"{len(differing)} tokens differ: {_differs(repr(token), found.get(token), own.get(token))}"


def _merges(checkpoint: Checkpoint, path: str) -> Iterator[str]:
    expected = tokenizer_files(checkpoint)[0].get("merges.txt")
    if expected is not None:
        own = parse_merges(expected, path)
        found = parse_merges(read_small(path, MAX_BYTES, "merges"), path)
        if own != found:
            yield "other merges than the checkpoint's"


def _genai(checkpoint: Checkpoint, path: str) -> Iterator[str]:
    """Sizes and ids of genai_config.json; in a directory of this program, its names too."""
    found = read_json_object(path, MAX_JSON_BYTES, GENAI_CONFIG)
    model: Any = found.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(decoder, dict):
        yield "has no decoder"
        return
    graph = str(decoder.get("filename"))
    own = genai_config(checkpoint, graph, in_place=graph.endswith("in_place.onnx"))
    whole = os.path.exists(os.path.join(os.path.dirname(path), MANIFEST_FILE))
    yield from _leaves(own, found, whole, "")


def _leaves(own: Mapping[str, Any], found: Mapping[str, Any], whole: bool, where: str) -> Iterator[str]:
    for key, value in own.items():
        if isinstance(value, dict):
            inner = found.get(key)
            yield from _leaves(value, inner if isinstance(inner, dict) else {}, whole, f"{where}{key}.")
        elif (whole or type(value) is int) and found.get(key) != value:
            yield f"{where}{key} is {_short(found.get(key))}, expected {_short(value)}"


def _differs(name: str, found: object, expected: object) -> str:
    return f"{name} is {_short(found)}, the checkpoint has {_short(expected)}"


def _short(value: object) -> str:
    return "absent" if value is None else short_repr(value, 60)


#: File → its differences from the checkpoint's.
CHECKS: Mapping[str, Callable[[Checkpoint, str], Iterator[str]]] = {
    CONFIG: _config,
    GENERATION_CONFIG: _generation,
    "tokenizer.json": _tokenizer,
    "vocab.json": _vocabulary,
    "merges.txt": _merges,
    GENAI_CONFIG: _genai,
}
