"""Damage to a copy of an export: its documents, tokenizer, ONNX graph and weights."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from campaigns.mutations import NUMBERS, VALUES, damaged, json_value, mutate

Change = Callable[[random.Random, Any], None]

#: Regular expressions that take exponential time, or are none.
PATTERNS = ("(a+)+$", "(?:(?:h|he|e)*)*z", "(", "", "\\", "a{1000}{1000}", "(?<=a*)b", "[\\d", "(.|\\s)*?x")
#: Sizes that allocate too much, divide by zero or overflow.
SIZES = (0, 1, -1, 2, 2**31, 2**32, 10**12, 2**63 - 1, 2**64 - 1)
#: Ids of special tokens.
IDS = (
    0,
    96,
    97,
    50256,
    -1,
    2**31,
    2**63,
    10**30,
    1.5,
    True,
    "96",
    None,
    [],
    [96, 97],
    [-1],
    ["a"],
    [[96]],
    {},
    1e308,
)
ID_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id")
BERT, TOKENIZER_FILES = (
    "BertTokenizer",
    (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
    ),
)
SIZE_KEYS = ("vocab_size", "n_positions", "n_ctx", "n_embd", "n_layer", "n_head", "n_inner")


def mutate_export(dice: random.Random, folder: Path, use: str) -> str:
    """Damage an export in ``folder`` where ``use`` reads it; returns a description."""
    kinds = ["anything", "tokenizer", "tokenizer"]
    if use != "tokenizer":
        kinds += ["config", "config"]
    if use in ("generate onnx", "verify"):
        kinds += ["graph"] * 4
    if use == "generate tf":
        kinds += ["saved model"] * 4
    return KINDS[dice.choice(kinds)](dice, folder)


def _anything(dice: random.Random, folder: Path) -> str:
    return mutate(dice, folder)


def _config(dice: random.Random, folder: Path) -> str:
    path = folder / dice.choice(("config.json", "config.json", "generation_config.json"))
    if dice.random() < 0.3:
        _write(path, json_value(dice, path.read_bytes() if path.is_file() else b"{}"))
        return f"{path.name}: json_value"
    key = dice.choice((*ID_KEYS, *SIZE_KEYS))
    value = dice.choice(IDS if key in ID_KEYS else (*NUMBERS, *VALUES))
    _edit(path, lambda raw: raw.__setitem__(key, value))
    return f"{path.name}: {key} {str(value)[:20]}"


# --- tokenizers -----------------------------------------------------------------------------------------------------


def _charsmap(dice: random.Random) -> str:
    """A precompiled table: the size of its trie, the trie, and texts."""
    raw = dice.choice((1, 4, 1 << 20, 1 << 31, (1 << 32) - 1)).to_bytes(4, "little") + dice.randbytes(64)
    return base64.b64encode(raw).decode()


def _normalizer(dice: random.Random) -> Any:
    return dice.choice(
        (
            {"type": "Precompiled", "precompiled_charsmap": _charsmap(dice)},
            {"type": "Replace", "pattern": {"Regex": dice.choice(PATTERNS)}, "content": "a" * dice.choice((0, 9999))},
            {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
            {"type": "Prepend", "prepend": "a" * 100_000},
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Sequence", "normalizers": [{"type": dice.choice(("NFC", "NFKD", "StripAccents", "Nmt"))}] * 50},
        )
    )


def _pre_tokenizer(dice: random.Random) -> Any:
    behaviour = dice.choice(("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"))
    return dice.choice(
        (
            {
                "type": "Split",
                "pattern": {dice.choice(("Regex", "String")): dice.choice(PATTERNS)},
                "behavior": behaviour,
                "invert": dice.random() < 0.5,
            },
            {
                "type": "Metaspace",
                "replacement": dice.choice(("", "_", "▁▁")),
                "prepend_scheme": "always",
                "split": True,
            },
            {"type": "CharDelimiterSplit", "delimiter": dice.choice((" ", "\0"))},
            {"type": "FixedLength", "length": dice.choice(SIZES)},
            {"type": "Digits", "individual_digits": True},
            {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": behaviour}] * 40},
        )
    )


def _processor(dice: random.Random) -> Any:
    token = {
        "id": "x",
        "ids": [dice.choice(SIZES)] * dice.choice((0, 1, 5000)),
        "tokens": ["x"] * dice.choice((0, 1)),
    }
    special, text = {"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return dice.choice(
        (
            {
                "type": "TemplateProcessing",
                "single": [special] * dice.choice((1, 3000)) + [text],
                "pair": [text],
                "special_tokens": {"x": token},
            },
            {"type": "BertProcessing", "sep": ["x", dice.choice(SIZES)], "cls": ["y", dice.choice(SIZES)]},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
        )
    )


def _decoder(dice: random.Random) -> Any:
    return dice.choice(
        (
            {"type": "Strip", "content": " ", "start": dice.choice(SIZES), "stop": dice.choice(SIZES)},
            {"type": "Replace", "pattern": {"Regex": dice.choice(PATTERNS)}, "content": "a" * 100_000},
            {"type": "WordPiece", "prefix": "", "cleanup": True},
            {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
            {"type": "BPEDecoder", "suffix": ""},
            {"type": "Sequence", "decoders": [{"type": dice.choice(("Fuse", "ByteFallback", "ByteLevel"))}] * 50},
        )
    )


def _padding(dice: random.Random) -> Any:
    return {
        "strategy": dice.choice(("BatchLongest", {"Fixed": dice.choice(SIZES)})),
        "direction": dice.choice(("Left", "Right")),
        "pad_to_multiple_of": dice.choice((None, *SIZES)),
        "pad_id": dice.choice(SIZES),
        "pad_type_id": 0,
        "pad_token": "x",
    }


def _truncation(dice: random.Random) -> Any:
    sizes = {"max_length": dice.choice(SIZES), "stride": dice.choice(SIZES)}
    return {"direction": "Right", "strategy": dice.choice(("LongestFirst", "OnlyFirst", "OnlySecond")), **sizes}


def _added(dice: random.Random) -> Any:
    flags = {name: dice.random() < 0.5 for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    texts = ("", " ", "a", "he", "\0", "x" * 10_000, "\u0120", "</s>")
    return [{"id": dice.choice((*SIZES, 96, 97)), "content": dice.choice(texts), **flags} for _ in range(3)]


def _model(dice: random.Random) -> Any:
    words = {"a": 0, "h": 1, "e": 2, "he": 3, "x": dice.choice((4, 97, 2**31, 2**32 - 1, 2**32))}
    return dice.choice(
        (
            {
                "type": "Unigram",
                "unk_id": dice.choice(SIZES),
                "vocab": [["a", 0.0], ["h", dice.choice((-1e308, 1e308, 0.0))], ["", -1.0]],
                "byte_fallback": dice.random() < 0.5,
            },
            {"type": "WordLevel", "vocab": words, "unk_token": dice.choice(("a", "?", ""))},
            {
                "type": "WordPiece",
                "vocab": words,
                "unk_token": dice.choice(("a", "?")),
                "continuing_subword_prefix": dice.choice(("", "##", "x" * 1000)),
                "max_input_chars_per_word": dice.choice((0, 100, 2**63)),
            },
            {
                "type": "BPE",
                "vocab": words,
                "merges": dice.choice((["h e"], [["h", "e"]], ["h h"], [" "], ["h e"] * 500)),
                "dropout": dice.choice((None, 0.0, 1.0, -1.0, 1e308)),
                "unk_token": dice.choice((None, "a", "?")),
                "continuing_subword_prefix": dice.choice((None, "", "hhhhhhhh", "é")),
                "end_of_word_suffix": dice.choice((None, "", "</w>")),
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": dice.random() < 0.5,
            },
        )
    )


#: Part of tokenizer.json → a hostile one.
PARTS: Mapping[str, Callable[[random.Random], Any]] = {
    "normalizer": _normalizer,
    "pre_tokenizer": _pre_tokenizer,
    "post_processor": _processor,
    "decoder": _decoder,
    "padding": _padding,
    "truncation": _truncation,
    "added_tokens": _added,
    "model": _model,
}


def _tokenizer(dice: random.Random, folder: Path) -> str:
    action = dice.random()
    if action < 0.7:
        part = dice.choice(list(PARTS))
        value = PARTS[part](dice)
        _edit(folder / "tokenizer.json", lambda raw: raw.__setitem__(part, value))
        return f"tokenizer.json: {part} {value.get('type', '') if isinstance(value, dict) else ''}"
    if action < 0.8:
        (folder / "vocab.txt").write_text(
            "\n".join(dice.choice(("[UNK]", "a", "##a", "", "[CLS]")) for _ in range(9))
        )
        settings = {
            "tokenizer_class": "BertTokenizer",
            dice.choice(("cls_token", "unk_token")): dice.choice(("$A", "")),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return "vocab.txt"
    path = folder / dice.choice(
        ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")
    )
    change = json_value if path.suffix == ".json" and dice.random() < 0.7 else damaged
    _write(path, change(dice, path.read_bytes() if path.is_file() else b'{"<new>": 97, "z": 98}'))
    return f"{path.name}: {change.__name__}"


# --- graphs ---------------------------------------------------------------------------------------------------------


def _graph(dice: random.Random, folder: Path) -> str:
    import onnx

    path = folder / "onnx" / "model.onnx"
    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception:  # damaged twice
        return mutate(dice, folder)
    name = dice.choice(list(GRAPH))
    GRAPH[name](dice, model.graph)
    _write(path, model.SerializeToString())
    return f"model.onnx: {name}"


def _value(dice: random.Random, graph: Any) -> Any:
    return dice.choice([*graph.input, *graph.output])


def _rename(dice: random.Random, graph: Any) -> None:
    _value(dice, graph).name = dice.choice(("x", "", "logits", "past_key_values.7.key", "é"))


def _remove_value(dice: random.Random, graph: Any) -> None:
    values = dice.choice((graph.input, graph.output))
    if values:
        del values[dice.randrange(len(values))]


def _add_value(dice: random.Random, graph: Any) -> None:
    values = dice.choice((graph.input, graph.output))
    new = values.add()
    new.CopyFrom(_value(dice, graph))
    new.name = dice.choice(("extra", new.name, "past_key_values.9.key", "use_cache_branch"))


def _retype(dice: random.Random, graph: Any) -> None:
    _value(dice, graph).type.tensor_type.elem_type = dice.choice((0, 1, 2, 6, 7, 8, 9, 10, 11, 14, 16, 99))


def _reshape(dice: random.Random, graph: Any) -> None:
    dims = _value(dice, graph).type.tensor_type.shape.dim
    if not dims or dice.random() < 0.3:
        dims.add().dim_value = 3
    elif dice.random() < 0.5:
        dice.choice(dims).dim_value = dice.choice((0, -1, 1, 97, 10**9, 2**63 - 1))
    else:
        dice.choice(dims).dim_param = "any"


def _untyped(dice: random.Random, graph: Any) -> None:
    _value(dice, graph).ClearField("type")


def _node(dice: random.Random, graph: Any) -> None:
    if not graph.node:
        return
    node, action = dice.choice(graph.node), dice.random()
    if action < 0.3:
        node.op_type = dice.choice(
            ("Relu", "Range", "Tile", "Expand", "Identity", "NoSuch", "ConstantOfShape", "Cast")
        )
    elif action < 0.6 and node.input:
        node.input[dice.randrange(len(node.input))] = dice.choice(dice.choice(graph.node).output or ["input_ids"])
    elif action < 0.8 and node.attribute:
        dice.choice(node.attribute).i = dice.choice((0, -1, 7, 1000, 2**63 - 1))
    else:
        graph.node.remove(node)


def _initializer(dice: random.Random, graph: Any) -> None:
    if not graph.initializer:
        return
    tensor, action = dice.choice(graph.initializer), dice.random()
    if action < 0.3 and tensor.external_data:
        dice.choice(tensor.external_data).value = dice.choice(
            ("0", "-1", "../x", "/dev/zero", "99999999", "model.onnx")
        )
    elif action < 0.6 and tensor.dims:
        tensor.dims[dice.randrange(len(tensor.dims))] = dice.choice((0, 1, -1, 24, 97, 10**9, 2**63 - 1))
    elif action < 0.8:
        tensor.data_type = dice.choice((0, 1, 7, 8, 10, 16, 22, 99))
    else:
        tensor.raw_data = dice.randbytes(dice.choice((0, 4, 8, 64)))


GRAPH: Mapping[str, Change] = {
    "an input or output renamed": _rename,
    "an input or output removed": _remove_value,
    "an input or output added": _add_value,
    "another type": _retype,
    "another shape": _reshape,
    "no type": _untyped,
    "a node": _node,
    "an initializer": _initializer,
}

KINDS: Mapping[str, Callable[[random.Random, Path], str]] = {
    "anything": _anything,
    "config": _config,
    "tokenizer": _tokenizer,
    "graph": _graph,
    "saved model": lambda dice, folder: mutate(dice, folder / "saved_model"),
}


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON object; start a new one if the file was damaged before."""
    try:
        raw = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        raw = {}
    raw = raw if isinstance(raw, dict) else {}
    change(raw)
    _write(path, json.dumps(raw).encode("utf-8", "surrogatepass"))


def _write(path: Path, data: bytes) -> None:
    """Write a file, unless an earlier mutation put something other than a file there."""
    if (path.is_file() and not path.is_symlink()) or (
        not path.exists() and not path.is_symlink() and path.parent.is_dir()
    ):
        path.write_bytes(data)
