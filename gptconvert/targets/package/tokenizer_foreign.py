"""Tokenizers other than GPT's BPE: BERT's in Chinese models, SentencePiece in Japanese and Nordic ones.

Their files are copied, so that transformers builds the same tokenizer from the output as from the source. BERT's
WordPiece also becomes ``tokenizer.json``, since the tokenizers library implements the same algorithm; other
vocabularies have no exact equivalent there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gptconvert.containers.json import dump_json, read_json_object
from gptconvert.containers.untrusted import read_small
from gptconvert.errors import InputError
from gptconvert.model.generation import GENERATION_CONFIG
from gptconvert.sources.tokenizer_files import is_copied, is_foreign
from gptconvert.targets.package.tokenizer_kinds import (
    KINDS,
    MAX_BYTES,
    MAX_ID,
    MAX_VALUES,
    WHOLE_FILE,
    Settings,
    token_text,
)

#: transformers' classes for the two kinds of BPE, and those that read any tokenizer.json; without ``Fast``.
OWN_CLASSES = frozenset(
    {
        *(name for kind in KINDS.values() for name in kind.classes),
        WHOLE_FILE.removesuffix("Fast"),
        "TokenizersBackend",
    }
)
WORD_PIECE, WORD_PIECE_FILE = "BertTokenizer", "vocab.txt"
#: BERT's special tokens.
WORD_PIECE_TOKENS: Mapping[str, str] = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
#: The order in which transformers adds special tokens that the vocabulary lacks.
SPECIAL_ORDER = ("bos_token", "eos_token", *WORD_PIECE_TOKENS)
#: Properties of an added token besides its text.
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
#: Settings that the tokenizers library does not implement.
NOT_EXPRESSIBLE: Mapping[str, object] = {"do_basic_tokenize": True, "never_split": None}


def stated_class(settings: Settings, config: Mapping[str, object]) -> str | None:
    """The tokenizer class of tokenizer_config.json or, failing that, config.json; without ``Fast``."""
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else None


def is_other(found: Mapping[str, str], name: str | None, *, complete: bool) -> bool:
    """Whether the files belong to another tokenizer than GPT's BPE.

    Args:
        found: file name → path.
        name: from :func:`stated_class`.
        complete: whether there are a vocabulary and merges.
    """
    if "tokenizer.json" in found or not found.keys() - {GENERATION_CONFIG}:
        return False
    foreign = any(map(is_foreign, found))
    return foreign if name is None or name in OWN_CLASSES else foreign or complete


def copied_files(found: Mapping[str, str]) -> dict[str, bytes]:
    """The files that are copied with every tokenizer: chat template, vocabularies of slow tokenizer classes."""
    return _read(found, filter(is_copied, found))


def _read(found: Mapping[str, str], names: Iterable[str]) -> dict[str, bytes]:
    """Files that are copied; all of them together are as small as one."""
    files: dict[str, bytes] = {}
    for name in names:
        files[name] = read_small(found[name], MAX_BYTES - sum(map(len, files.values())), "the tokenizer's files")
    return files


def foreign_files(
    found: Mapping[str, str], settings: Settings, name: str | None
) -> tuple[dict[str, bytes], dict[str, int], tuple[str, ...]]:
    """The files of another tokenizer.

    Returns:
        file name → bytes, the token ids (empty if unknown), and notes for the user.

    Raises:
        InputError: a file is corrupt.
    """
    files = _read(found, (name for name in found if name != GENERATION_CONFIG))
    obstacle = _obstacle(found, settings, name)
    made: Any = None
    if obstacle is None:
        made = word_piece(found[WORD_PIECE_FILE], files[WORD_PIECE_FILE], settings, _added(found, settings))
        obstacle = made if isinstance(made, str) else None
    if obstacle is not None:
        listed = ", ".join(sorted(n for n in files if is_foreign(n))) or ", ".join(sorted(files))
        return files, {}, (f"the tokenizer ({listed}) was copied, but tokenizer.json was not written: {obstacle}",)
    if "tokenizer_config.json" not in files:
        files["tokenizer_config.json"] = dump_json({"tokenizer_class": WORD_PIECE, **settings})
    files["tokenizer.json"] = made.to_str(pretty=True).encode()
    return files, made.get_vocab(with_added_tokens=True), ()


def _obstacle(found: Mapping[str, str], settings: Settings, name: str | None) -> str | None:
    """Why the tokenizer cannot be written as tokenizer.json; None if it can."""
    if name is None:
        return 'neither tokenizer_config.json nor config.json states a tokenizer_class (BERT\'s is "BertTokenizer")'
    if settings.get("auto_map"):
        return f"{name} is Python code of the checkpoint, which was not copied"
    if name != WORD_PIECE or WORD_PIECE_FILE not in found:
        return f"{name} has no exact equivalent in the tokenizers library"
    unusual = [key for key, usual in NOT_EXPRESSIBLE.items() if settings.get(key, usual) != usual]
    return f"the tokenizers library does not implement {unusual[0]}" if unusual else None


def word_piece(path: str, data: bytes, settings: Settings, added: Mapping[int, Mapping[str, Any]]) -> Any:
    """BERT's tokenizer as a ``tokenizers.Tokenizer``, or the reason why it cannot be one.

    The same parts as ``BertTokenizer`` of transformers 5 and ``BertTokenizerFast`` of 4.

    Raises:
        InputError: the vocabulary is not UTF-8, or it has no tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = _vocabulary(path, data)
    stated = {key: token_text(settings.get(key)) for key in SPECIAL_ORDER}
    named = {**WORD_PIECE_TOKENS, **{key: token for key, token in stated.items() if token}}
    first, last, unknown = (named[key] for key in ("cls_token", "sep_token", "unk_token"))
    if unknown not in vocabulary:
        return f"the vocabulary lacks {unknown}"
    if any(c.isspace() or c == ":" for c in first + last):  # characters of the template's own syntax
        return f"the tokens {first!r} and {last!r} cannot be put around texts"
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    strip = settings.get("strip_accents")
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
        strip_accents=strip if isinstance(strip, bool) else None,
        lowercase=settings.get("do_lower_case") is not False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    for number, token in sorted(added.items()):
        tokenizer.add_tokens([AddedToken(**token)])
        if tokenizer.token_to_id(token["content"]) != number:
            return "added tokens have gaps in their ids"
    special = [named[key] for key in SPECIAL_ORDER if key in named]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((first, last))],
    )
    return tokenizer


def _vocabulary(path: str, data: bytes) -> dict[str, int]:
    """Token → id, one token per line; a repeated token has its last id."""
    if data.count(b"\n") > MAX_ID:
        raise InputError("the vocabulary has too many tokens", path=path, expected=f"at most {MAX_ID}")
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", path=path) from error
    lines = lines[:-1] if lines[-1] == "" else lines
    if not lines:
        raise InputError("the vocabulary has no tokens", path=path)
    return {line.rstrip(): number for number, line in enumerate(lines)}


def _added(found: Mapping[str, str], settings: Settings) -> dict[int, dict[str, Any]]:
    """Id → arguments of ``AddedToken``, from tokenizer_config.json or, failing that, added_tokens.json."""
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return {
            int(number): {
                "content": token["content"],
                **{key: token[key] for key in FLAGS if token.get(key) in (True, False)},
            }
            for number, token in decoder.items()
            if re.fullmatch("[0-9]{1,9}", number) and isinstance(token, dict) and token_text(token)
        }
    path = found.get("added_tokens.json")
    raw = {} if path is None else read_json_object(path, MAX_BYTES, "added tokens", MAX_VALUES)
    ids = {token: number for token, number in raw.items() if isinstance(number, int) and 0 <= number < MAX_ID}
    if len(ids) < len(raw):
        raise InputError("invalid added tokens", path=path, expected=f"ids from 0 to {MAX_ID - 1}")
    special = {token_text(settings.get(key)) for key in SPECIAL_ORDER} | set(_texts(settings))
    return {
        number: {"content": token, "normalized": token not in special, "special": token in special}
        for token, number in ids.items()
    }


def _texts(settings: Settings) -> list[str]:
    """The further special tokens."""
    tokens = settings.get("additional_special_tokens") or settings.get("extra_special_tokens")
    return [text for text in map(token_text, tokens) if text] if isinstance(tokens, list) else []
