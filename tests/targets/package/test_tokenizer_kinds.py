"""A source's own tokenizer.json: copied unchanged, and used unchanged by transformers.

GPT-NeoX's is the case in point. It is byte-level BPE like GPT-2's, but text is put into composed form first and runs
of spaces are tokens, so that transformers' GPT-2 class, given its vocabulary and merges, makes other ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from gptconvert import pipeline
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.targets.package.sidecars import with_special_ids
from gptconvert.targets.package.tokenizer import end_token_id, tokenizer_files
from gptconvert.targets.package.tokenizer_kinds import KINDS, WHOLE_FILE, behaviour
from tests.families import witness
from tests.helpers import checkpoint_of
from tests.targets.package.test_tokenizer import CORPUS as GENERAL
from tests.targets.package.test_tokenizer import PUBLISHED, write_all

END, PAD = "<|endoftext|>", "<|padding|>"
CORPUS = [
    *GENERAL,
    "cafe\u0301 and café, A\u030angstro\u0308m",
    "def f(x):\n        if x:\n            return 1\n",
    f"the{END}the {PAD} {END}",
    *(f"a{' ' * n}b" for n in range(1, 27)),
]
BYTE_LEVEL = KINDS["byte-level"]


def neox() -> Any:
    """A tokenizer like GPT-NeoX-20B's: special tokens first, runs of 24 to 2 spaces added last."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("Ã", "©"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("f", "Ã©")]
    symbols = [END, PAD, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(symbols)}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (END, PAD)])
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return tokenizer


SIZE = 2 + 256 + 8 + 23
PADDED = 307


def gpt_neox(tokenizer: dict[str, str], directory: Path, n_vocab: int = PADDED, **config: object) -> Checkpoint:
    """A tiny GPT-NeoX with these tokenizer files; its configuration has special ids only if ``config`` does."""
    case = witness.Case("gpt_neox", keys={"vocab_size": n_vocab}, name=str(n_vocab))
    raw, arrays = witness.saved(case, directory)
    raw = {key: value for key, value in raw.items() if not key.endswith("_token_id")}
    return checkpoint_of({**raw, **config}, arrays, directory, tokenizer=tokenizer)


@pytest.fixture
def source(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "source").mkdir()
    neox().save(str(tmp_path / "source/tokenizer.json"))
    return {"tokenizer.json": str(tmp_path / "source/tokenizer.json")}


def with_config(source: dict[str, str], content: dict[str, object]) -> dict[str, str]:
    path = Path(source["tokenizer.json"]).parent / "tokenizer_config.json"
    path.write_text(json.dumps(content))
    return {**source, "tokenizer_config.json": str(path)}


NAMED = {"bos_token": END, "eos_token": END, "unk_token": END, "add_prefix_space": False}


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"model_max_length": 2048, "pad_token": PAD},
        {**NAMED, "tokenizer_class": "GPTNeoXTokenizer"},
        {**NAMED, "tokenizer_class": "GPTNeoXTokenizerFast", "pad_token": PAD},
        {**NAMED, "tokenizer_class": "PreTrainedTokenizerFast"},
    ],
)
def test_neox_as_transformers_reads_it_from_the_output(
    config: dict[str, object] | None, source: dict[str, str], tmp_path: Path
) -> None:
    found = source if config is None else with_config(source, config)
    checkpoint = gpt_neox(found, tmp_path)
    files, notes = tokenizer_files(checkpoint)
    assert notes == (f"the vocabulary is padded: the model has {PADDED} ids, the tokenizer {SIZE}",)
    assert set(files) == PUBLISHED
    assert files["tokenizer.json"] == Path(source["tokenizer.json"]).read_bytes()
    written = json.loads(files["tokenizer_config.json"])
    assert written["tokenizer_class"] == (config or {}).get("tokenizer_class", WHOLE_FILE)
    assert (written["eos_token"], written["pad_token"]) == (END, (config or {}).get("pad_token"))
    assert written["model_input_names"] == ["input_ids", "attention_mask"]  # transformers 4 adds token types
    out = write_all(tmp_path / "out", {**files, "config.json": b'{"model_type": "gpt_neox"}'})
    loaded, plain = transformers.AutoTokenizer.from_pretrained(out), neox()
    assert len(loaded) == SIZE
    for text in CORPUS:
        ids = plain.encode(text).ids
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == plain.decode(ids, skip_special_tokens=False)
    assert loaded.decode(plain.encode(f"the{END}{PAD}").ids, skip_special_tokens=True) == "the"


def test_class_of_gpt2_would_give_other_ids(source: dict[str, str], tmp_path: Path) -> None:
    """The reason why the output does not name this class."""
    files, _ = tokenizer_files(gpt_neox(with_config(source, {"tokenizer_class": "GPT2Tokenizer"}), tmp_path))
    loaded = transformers.AutoTokenizer.from_pretrained(write_all(tmp_path / "out", files))
    assert loaded("cafe\u0301")["input_ids"] != neox().encode("cafe\u0301").ids


def test_a_leading_space_in_the_file_stays(source: dict[str, str], tmp_path: Path) -> None:
    spaced = neox()
    spaced.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    spaced.save(source["tokenizer.json"])
    files, _ = tokenizer_files(gpt_neox(source, tmp_path))
    assert "add_prefix_space" not in json.loads(files["tokenizer_config.json"])  # nothing that contradicts it
    loaded = transformers.AutoTokenizer.from_pretrained(write_all(tmp_path / "out", files))
    assert loaded("the")["input_ids"] == spaced.encode("the").ids == neox().encode(" the").ids


def test_leading_space_set_by_the_source(tmp_path: Path) -> None:
    """A vocabulary and merges with ``add_prefix_space`` in tokenizer_config.json."""
    raw = json.loads(neox().to_str())["model"]
    contents = {
        "vocab.json": raw["vocab"],
        "tokenizer_config.json": {"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"},
    }
    files = {name: json.dumps(content).encode() for name, content in contents.items()}
    lines = "".join(f"{a} {b}\n" for a, b in raw["merges"])
    source = write_all(tmp_path / "source", {**files, "merges.txt": f"#version: 0.2\n{lines}".encode()})
    found = {path.name: str(path) for path in source.iterdir()}
    written, _ = tokenizer_files(gpt_neox(found, tmp_path))
    witness = transformers.GPT2Tokenizer.from_pretrained(source)
    loaded = transformers.AutoTokenizer.from_pretrained(write_all(tmp_path / "out", written))
    plain = tokenizers.Tokenizer.from_str(written["tokenizer.json"].decode())
    for text in ("the the", " the", "caf\u00e9"):
        assert plain.encode(text).ids == loaded(text)["input_ids"] == witness(text)["input_ids"]
    assert plain.encode("the").ids == witness(" the")["input_ids"]


def test_special_ids_come_from_the_tokenizer(source: dict[str, str], tmp_path: Path) -> None:
    """The trainer's YAML has none, and id 0 is a valid id, not a missing one."""
    checkpoint = gpt_neox(source, tmp_path)
    files, _ = tokenizer_files(checkpoint)
    assert end_token_id(checkpoint, files) == 0
    assert with_special_ids(checkpoint, files).special_ids.eos == (0,)
    stated = gpt_neox(source, tmp_path, eos_token_id=5)
    assert with_special_ids(stated, files).special_ids.eos == (5,)


def test_vocabulary_and_merges_beside_it_are_equal(source: dict[str, str], tmp_path: Path) -> None:
    files, _ = tokenizer_files(gpt_neox(source, tmp_path))
    model = json.loads(files["tokenizer.json"])["model"]
    assert json.loads(files["vocab.json"]) == model["vocab"]
    assert files["merges.txt"].decode().split("\n")[1:-1] == [" ".join(pair) for pair in model["merges"]]


@pytest.mark.parametrize(
    ("n_vocab", "expected"), [(SIZE, ()), (SIZE - 1, ("will fail",)), (SIZE + 1, ("is padded",))]
)
def test_vocabulary_of_another_size(
    n_vocab: int, expected: tuple[str, ...], source: dict[str, str], tmp_path: Path
) -> None:
    """Added tokens count."""
    _, notes = tokenizer_files(gpt_neox(source, tmp_path, n_vocab))
    assert [words in note for words, note in zip(expected, notes, strict=True)] == [True] * len(expected)


def test_conversion(source: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    result = pipeline.convert(gpt_neox(source, tmp_path / "weights"), str(tmp_path / "out"))
    assert result.report is not None
    assert result.report.passed
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded(CORPUS[-1])["input_ids"] == neox().encode(CORPUS[-1]).ids
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 0


# Which class describes a tokenizer.


def gpt2(**changes: Any) -> Any:
    """GPT-2's tokenizer as in the hub's tokenizer.json, with ``changes`` to its parts."""
    raw = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": {"t": 0, "h": 1, "th": 2},
            "merges": ["t h"],
        },
    }
    raw["model"] |= changes.pop("model", {})  # type: ignore[operator]
    return tokenizers.Tokenizer.from_str(json.dumps({**raw, **changes}))


def test_tokenizer_of_gpt2_is_described() -> None:
    assert BYTE_LEVEL.describes(behaviour(gpt2()), {})
    assert BYTE_LEVEL.describes(behaviour(gpt2()), {"add_prefix_space": False, "model_max_length": 7})
    offsets = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    assert BYTE_LEVEL.describes(behaviour(gpt2(pre_tokenizer=offsets)), {})


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}},
        {"model": {"end_of_word_suffix": "</w>"}},
        {"model": {"unk_token": "t"}},
        {"model": {"ignore_merges": True}},
        {"model": {"dropout": 0.1}},
        {"model": {"type": "WordLevel", "unk_token": "t", "merges": None}},
    ],
)
def test_other_tokenizers_use_the_whole_file(changes: dict[str, Any]) -> None:
    assert not BYTE_LEVEL.describes(behaviour(gpt2(**changes)), {})


def test_leading_space_in_the_settings() -> None:
    spaced = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    assert BYTE_LEVEL.describes(behaviour(gpt2(pre_tokenizer=spaced)), {"add_prefix_space": True})
    assert not BYTE_LEVEL.describes(behaviour(gpt2()), {"add_prefix_space": True})


def test_a_kind_describes_what_it_builds() -> None:
    for kind in KINDS.values():
        built = kind.build({"<unk>": 0, "t": 1}, (), {})
        assert [name for name, other in KINDS.items() if other.describes(behaviour(built), {})] == [
            name for name, other in KINDS.items() if other is kind
        ]
