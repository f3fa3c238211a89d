"""Tokenizer files: released vocabulary and merges ⇄ ``tokenizer.json`` and the files transformers reads beside it.

Byte pair encoding splits text into pieces, writes each piece in the symbols of an alphabet, and merges pairs of
symbols in the order of the merges file; ``tokenizer_kinds`` defines the splitting and the alphabets. The vocabulary
is JSON, symbol → id; a merges file has one pair per line, best first, below a ``#version`` line. A missing tokenizer
is not an error; a corrupt one is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptconvert.containers.json import dump_json, parse_json, read_json_object
from gptconvert.containers.untrusted import read_small
from gptconvert.errors import InputError, short_repr
from gptconvert.families.registry import family_named
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.source import StoredTokenizer
from gptconvert.targets.package.tokenizer_foreign import copied_files, foreign_files, is_other, stated_class
from gptconvert.targets.package.tokenizer_json import portable_json
from gptconvert.targets.package.tokenizer_kinds import (
    KINDS,
    MAX_BYTES,
    MAX_ID,
    MAX_VALUES,
    OTHER_SETTINGS,
    WHOLE_FILE,
    Kind,
    Merges,
    Settings,
    Vocabulary,
    behaviour,
    kind_of,
    token_text,
)
from gptconvert.targets.package.tokenizer_process import describe

MAX_MERGES = 1_000_000
VERSION_LINE = "#version: 0.2"
#: Keys of tokenizer_config.json about the origin of the file rather than the tokenizer.
LOCATIONS = frozenset("name_or_path special_tokens_map_file tokenizer_file is_local local_files_only".split())
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

Files = dict[str, bytes]


@dataclass(frozen=True)
class _Pair:
    """A vocabulary and merges, and the bytes to publish as vocab.json and merges.txt."""

    vocabulary: Vocabulary
    merges: Merges
    files: Files
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Made:
    """A tokenizer's behaviour, its files to publish, all its tokens, and notes for the user."""

    behaviour: Sequence[object]
    files: Files
    tokens: Vocabulary
    notes: tuple[str, ...]


def tokenizer_files(checkpoint: Checkpoint) -> tuple[Files, tuple[str, ...]]:
    """``tokenizer.json``, ``tokenizer_config.json``, ``vocab.json`` and ``merges.txt`` of a checkpoint.

    Files already in the required form are copied byte for byte, and so are those of a tokenizer that is not BPE.

    Returns:
        file name → bytes (empty if the checkpoint has no tokenizer), and notes for the user.

    Raises:
        InputError: a tokenizer file is corrupt.
        UnsafeInputError: a file is not a regular file.
    """
    found, stored = checkpoint.source.tokenizer, checkpoint.source.stored_tokenizer
    settings = {**_settings(found), **(stored.settings if stored is not None else {})}
    name = stated_class(settings, checkpoint.source.config)
    kind = kind_of(name, family_named(checkpoint.config.family).tokenizer)
    vocabulary, merges = _first(found, kind.vocabulary), _first(found, kind.merges)
    complete = vocabulary is not None and merges is not None
    if stored is not None:
        return _stored(stored, checkpoint, settings)
    if is_other(found, name, complete=complete):
        return _other(checkpoint, settings, name)
    pair = None if vocabulary is None or merges is None else _read_pair(vocabulary, merges)
    if "tokenizer.json" in found:
        made = _copy(found["tokenizer.json"], pair)
    elif pair is not None and merges is not None:
        _check_merges(pair, merges)
        made = _build(pair, kind, settings, found.get("added_tokens.json"))
    else:
        return copied_files(found), (_missing_note(kind, vocabulary, merges),)
    files, notes = _completed(made, kind, settings, checkpoint)
    return {**copied_files(found), **files}, notes


def _completed(made: _Made, kind: Kind, settings: Settings, checkpoint: Checkpoint) -> tuple[Files, tuple[str, ...]]:
    """A tokenizer's files with its tokenizer_config.json, and notes for the user."""
    config = _config(kind, made, settings, checkpoint.config.n_ctx)
    size = _size_note(max(made.tokens.values()) + 1, checkpoint.config.vocab_size)
    endless = kind.end is not None and config["eos_token"] is None
    end = ("the tokenizer has no end-of-text token",) if endless else ()
    return {**made.files, "tokenizer_config.json": dump_json(config)}, (*made.notes, *end, *size)


def _stored(stored: StoredTokenizer, checkpoint: Checkpoint, settings: Settings) -> tuple[Files, tuple[str, ...]]:
    """The files of a tokenizer that the weights file holds.

    Raises:
        InputError: a merge is not a pair of symbols of the vocabulary.
    """
    path, kind = checkpoint.source.path, KINDS["byte-level"]
    wrong = [merge for merge in stored.merges if len(merge) != 2 or not _merged([*merge], stored.vocabulary)]
    if wrong:
        expected, found = "two symbols of the vocabulary", short_repr(" ".join(wrong[0]))
        raise InputError("invalid merge in the tokenizer", path=path, expected=expected, found=found)
    merges = [(a, b) for a, b in stored.merges]
    vocabulary = dict(sorted(stored.vocabulary.items(), key=lambda entry: entry[1]))
    files = {"vocab.json": json.dumps(vocabulary).encode("ascii"), "merges.txt": _merges_text(merges)}
    pair = _Pair(vocabulary, merges, files)
    _check_merges(pair, path)
    return _completed(_build(pair, kind, settings, None, stored), kind, settings, checkpoint)


def _other(checkpoint: Checkpoint, settings: Settings, name: str | None) -> tuple[Files, tuple[str, ...]]:
    """The files of a tokenizer that is not GPT's BPE, without the settings that name local paths."""
    files, ids, notes = foreign_files(checkpoint.source.tokenizer, settings, name)
    path = checkpoint.source.tokenizer.get("tokenizer_config.json")
    raw = {} if path is None else read_json_object(path, MAX_BYTES, "tokenizer_config.json")
    if LOCATIONS & raw.keys():
        files["tokenizer_config.json"] = dump_json({key: raw[key] for key in raw if key not in LOCATIONS})
    size = _size_note(max(ids.values()) + 1, checkpoint.config.vocab_size) if ids else ()
    return files, (*notes, *size)


def end_token_id(checkpoint: Checkpoint, files: Mapping[str, bytes]) -> int | None:
    """The id of the end-of-text token in the files of :func:`tokenizer_files`; None if they do not have one."""
    kind = kind_of(None, family_named(checkpoint.config.family).tokenizer)
    if "tokenizer.json" not in files or kind.end is None:
        return None
    raw: Any = json.loads(files["tokenizer.json"])
    added: dict[str, int] = {token["content"]: token["id"] for token in raw.get("added_tokens") or ()}
    vocabulary = raw["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram's: token, score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    found: int | None = vocabulary.get(kind.end, added.get(kind.end))
    return found


def parse_vocabulary(data: bytes, path: str) -> dict[str, int]:
    """Symbol → id, from a JSON object.

    Raises:
        InputError: not a JSON object of distinct non-negative integers.
    """
    raw = parse_json(data, path, "vocabulary", MAX_VALUES)
    if not isinstance(raw, dict) or not raw:
        raise InputError("invalid vocabulary", path=path, expected="a JSON object of ids", found=repr(raw)[:80])
    return _checked_ids(raw, path)


def parse_merges(data: bytes, path: str) -> list[tuple[str, str]]:
    """The pairs of a merges file, best first.

    The version line may be missing, and line endings may be those of Windows. Only the first line can be a comment:
    GPT-2's file contains merges that begin with ``#``.

    Raises:
        InputError: not UTF-8, or a line does not contain two symbols.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"merges file is not UTF-8 text ({error.reason} at byte {error.start})", path=path
        ) from error
    if (count := text.count("\n")) > MAX_MERGES:
        raise InputError("too many merges", path=path, expected=f"at most {MAX_MERGES}", found=count)
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    first = int(bool(lines) and lines[0].startswith("#version"))
    pairs = [tuple(line.split(" ")) for line in lines[first:]]
    wrong = [n for n, pair in enumerate(pairs) if len(pair) != 2 or not all(pair)]
    if wrong or not pairs:
        line = repr(" ".join(pairs[wrong[0]]))[:80] if wrong else "the end of the file"
        where = f"line {1 + first + wrong[0]}, {line}; {len(wrong)} such lines" if wrong else line
        raise InputError("invalid merges file", path=path, expected="two symbols separated by a space", found=where)
    return [(a, b) for a, b in pairs]


def _read_pair(vocabulary_path: str, merges_path: str) -> _Pair:
    symbols = read_small(vocabulary_path, MAX_BYTES, "a vocabulary")
    vocabulary = parse_vocabulary(symbols, vocabulary_path)
    lines = read_small(merges_path, MAX_BYTES, "a merges file")
    merges = parse_merges(lines, merges_path)
    exact = lines.startswith(b"#version") and lines.endswith(b"\n") and b"\r" not in lines
    note = "merges.txt was rewritten: the source lacks the version line or final newline, or has CRLF line endings"
    files = {"vocab.json": symbols, "merges.txt": lines if exact else _merges_text(merges)}
    return _Pair(vocabulary, merges, files, () if exact else (note,))


def _build(
    pair: _Pair, kind: Kind, settings: Settings, added_path: str | None, stored: StoredTokenizer | None = None
) -> _Made:
    """Build a tokenizer from a vocabulary, merges and any tokens added in fine-tuning."""
    tokenizer = kind.build(pair.vocabulary, pair.merges, settings)
    named = {str(token_text(settings[key])) for key in NAMED_TOKENS if settings.get(key) is not None}
    special = dict.fromkeys((*kind.named.values(), *sorted(named), *(stored.special if stored else ())))
    _add_special(tokenizer, [token for token in special if token in pair.vocabulary])
    if stored is not None:
        _add_plain(tokenizer, stored.added)
    added = {} if added_path is None else _add_tokens(tokenizer, added_path, named)
    absent = sum(symbol not in pair.vocabulary for symbol in kind.alphabet(settings))
    lossy = f"{absent} symbols of the alphabet are not in the vocabulary and are lost when text is encoded"
    files = {"tokenizer.json": portable_json(tokenizer, kind, settings), **pair.files}
    tokens, notes = {**pair.vocabulary, **added}, (*pair.notes, *([lossy] if absent else []))
    return _Made(behaviour(tokenizer), files, tokens, notes)


def _add_special(tokenizer: Any, tokens: Iterable[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])


def _add_plain(tokenizer: Any, tokens: Iterable[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])


def _add_tokens(tokenizer: Any, path: str, special: Iterable[str]) -> dict[str, int]:
    """Add the tokens of an ``added_tokens.json`` in the order of their ids, and check that they keep their ids."""
    from tokenizers import AddedToken

    added = _checked_ids(read_json_object(path, MAX_BYTES, "added tokens", MAX_VALUES), path)
    for token, number in sorted(added.items(), key=lambda entry: entry[1]):
        is_special = token in special
        tokenizer.add_tokens([AddedToken(token, normalized=not is_special, special=is_special)])
        if tokenizer.token_to_id(token) != number:
            raise InputError(
                "ids of added tokens do not continue those of the vocabulary",
                path=path,
                item=token,
                expected=f"id {tokenizer.token_to_id(token)}",
                found=f"id {number}",
            )
    return added


def _copy(path: str, pair: _Pair | None) -> _Made:
    """Copy a ``tokenizer.json``, with vocab.json and merges.txt of the same content."""
    data = read_small(path, MAX_BYTES, "tokenizer.json")
    raw = parse_json(data, path, "tokenizer.json", MAX_VALUES)
    found = describe(data, path)
    tokens = found.tokens
    if not tokens:
        raise InputError("the tokenizer has no tokens", path=path)
    model: Any = raw.get("model") if isinstance(raw, dict) else None
    if not isinstance(model["vocab"], dict) or "merges" not in model:
        note = f"the tokenizer is not BPE ({model.get('type')}): vocab.json and merges.txt were left out"
        return _Made(found.behaviour, {"tokenizer.json": data}, tokens, (note,))
    vocabulary, merges = stored_bpe(model, path)
    if pair is not None and (pair.vocabulary, pair.merges) == (vocabulary, merges):
        return _Made(found.behaviour, {"tokenizer.json": data, **pair.files}, tokens, pair.notes)
    rewritten = {
        "vocab.json": json.dumps(dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))).encode("ascii"),
        "merges.txt": _merges_text(merges),
    }
    note = "vocab.json or merges.txt disagrees with tokenizer.json: both were rewritten from tokenizer.json"
    return _Made(found.behaviour, {"tokenizer.json": data, **rewritten}, tokens, (note,) if pair else ())


def stored_bpe(model: Mapping[str, Any], path: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges of the ``model`` in a tokenizer.json; since tokenizers 0.20, merges are pairs.

    Raises:
        InputError: the vocabulary is not an object of ids, or the merges are not pairs of its symbols.
    """
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise InputError("the model of the tokenizer has no vocabulary or no merges", path=path)
    vocabulary = _checked_ids(model["vocab"], path)
    pairs = [entry.split(" ") if isinstance(entry, str) else entry for entry in model["merges"]]
    wrong = next((p for p in pairs if not isinstance(p, list) or len(p) != 2 or not _merged(p, vocabulary)), None)
    if wrong is not None:
        raise InputError(
            "invalid merge", path=path, expected="two symbols of the vocabulary", found=short_repr(wrong)
        )
    return vocabulary, [(a, b) for a, b in pairs]


def _merged(pair: list[Any], vocabulary: Vocabulary) -> bool:
    """Whether both symbols are in the vocabulary."""
    return all(isinstance(symbol, str) and symbol in vocabulary for symbol in pair)


def _merges_text(merges: Merges) -> bytes:
    return "".join(f"{line}\n" for line in (VERSION_LINE, *(f"{a} {b}" for a, b in merges))).encode()


def _checked_ids(raw: Mapping[str, object], path: str) -> dict[str, int]:
    ids: dict[str, int] = {}
    owner: dict[int, str] = {}
    for token, number in raw.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MAX_ID:
            raise InputError(
                "invalid id", path=path, item=token, expected=f"0 to {MAX_ID - 1}", found=repr(number)[:80]
            )
        if number in owner:
            raise InputError(f"two tokens have the id {number}", path=path, found=f"{owner[number]!r} and {token!r}")
        ids[token], owner[number] = number, token
    return ids


def _check_merges(pair: _Pair, path: str) -> None:
    unknown = [(a, b) for a, b in pair.merges if not {a, b, a + b} <= pair.vocabulary.keys()]
    if unknown:
        shown = ", ".join(repr(" ".join(merge)) for merge in unknown[:3])
        raise InputError(
            f"{len(unknown)} of {len(pair.merges)} merges contain symbols missing from the vocabulary, first {shown}",
            path=path,
            hint="the vocabulary and the merges belong to different tokenizers, or one of the files is corrupt",
        )


def _settings(found: Mapping[str, str]) -> dict[str, object]:
    """The settings of the source's tokenizer_config.json and special_tokens_map.json; the former takes precedence."""
    settings: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in found:
            settings |= read_json_object(found[name], MAX_BYTES, name)
    return {key: value for key, value in settings.items() if key not in LOCATIONS}


def _config(kind: Kind, made: _Made, settings: Settings, n_ctx: int) -> dict[str, object]:
    """tokenizer_config.json: the source's settings, completed with defaults."""
    usual = kind.describes(made.behaviour, settings)
    default: dict[str, object] = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"))
    default |= {key: token for key, token in kind.named.items() if token in made.tokens}
    common = {"model_max_length": n_ctx, "tokenizer_class": kind.tokenizer_class if usual else WHOLE_FILE}
    stated = {key: token_text(value) if key in NAMED_TOKENS else value for key, value in settings.items()}
    return {**default, **(kind.settings if usual else OTHER_SETTINGS), **common, **stated}


def _first(found: Mapping[str, str], names: Iterable[str]) -> str | None:
    return next((found[name] for name in names if name in found), None)


def _missing_note(kind: Kind, vocabulary: str | None, merges: str | None) -> str:
    lacking = [
        " or ".join(names) for names, path in ((kind.vocabulary, vocabulary), (kind.merges, merges)) if not path
    ]
    if len(lacking) == 2:
        return "the checkpoint has no tokenizer files: none were written"
    return f"the tokenizer is incomplete ({lacking[0]} is missing): no tokenizer files were written"


def _size_note(tokens: int, n_vocab: int) -> tuple[str, ...]:
    if tokens < n_vocab:
        return (f"the vocabulary is padded: the model has {n_vocab} ids, the tokenizer {tokens}",)
    if tokens > n_vocab:
        return (f"the tokenizer has {tokens} ids, the model only {n_vocab}: ids {n_vocab} and above will fail",)
    return ()
