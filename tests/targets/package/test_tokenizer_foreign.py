"""Tokenizers that are not GPT's BPE: AutoTokenizer gives the source's ids on the output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from gptconvert import pipeline
from gptconvert.errors import InputError
from gptconvert.model.options import Options
from gptconvert.targets.package import tokenizer_foreign
from gptconvert.targets.package.tokenizer import tokenizer_files
from tests.helpers import FIXTURES, checkpoint_of, tiny_gpt2

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] 我 是 中 国 人 hello ##lo hel He ##l world é e , . ##é caf".split()
VOCAB = "".join(f"{word}\n" for word in WORDS)
TEXTS = [
    "",
    "我是中国人, hello world.",
    "Héllo HELLO Hello café 我x我",
    "[MASK]我 [CLS] [X] [x] [Y]y <z>",
    "e\u0301 \x00\t\u3000我\ufffd",
]
N = 30


def source(tmp_path: Path, config: dict[str, object] | None = None, **files: object) -> Path:
    """A Hugging Face checkpoint with these tokenizer files (dots written ``__``)."""
    directory = Path(shutil.copytree(FIXTURES / "tiny-gpt2" / "hf-safetensors", tmp_path / "source"))
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **(config or {})}))
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / name.replace("__", ".")).write_text(text, newline="")
    return directory


def converted(directory: Path, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    result = pipeline.convert(directory, tmp_path / "out", Options(targets=("safetensors",), verify=None))
    return tmp_path / "out", tuple(note for note in result.notes if "tokenizer" in note)


CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "class in config.json": ({"tokenizer_class": "BertTokenizer"}, {}),
    "class in tokenizer_config.json": ({}, {"tokenizer_config__json": {"tokenizer_class": "BertTokenizerFast"}}),
    "cased": ({"tokenizer_class": "BertTokenizer"}, {"tokenizer_config__json": {"do_lower_case": False}}),
    "accents kept": ({}, {"tokenizer_config__json": {"tokenizer_class": "BertTokenizer", "strip_accents": False}}),
    "accents stripped": (
        {},
        {
            "tokenizer_config__json": {
                "tokenizer_class": "BertTokenizer",
                "strip_accents": True,
                "do_lower_case": False,
            }
        },
    ),
    "no Chinese splitting": (
        {},
        {"tokenizer_config__json": {"tokenizer_class": "BertTokenizer", "tokenize_chinese_chars": False}},
    ),
    "added tokens": (
        {},
        {
            "tokenizer_config__json": {
                "tokenizer_class": "BertTokenizer",
                "name_or_path": "/home/me/run",
                "additional_special_tokens": ["[X]"],
            },
            "added_tokens__json": {"[X]": len(WORDS), "[Y]": len(WORDS) + 1},
            "special_tokens_map__json": {"cls_token": "[CLS]", "sep_token": {"content": "[SEP]", "lstrip": False}},
        },
    ),
    "added tokens with their rules": (
        {},
        {
            "tokenizer_config__json": {
                "tokenizer_class": "BertTokenizer",
                "added_tokens_decoder": {
                    str(len(WORDS)): {
                        "content": "<z>",
                        "lstrip": True,
                        "rstrip": False,
                        "normalized": False,
                        "single_word": False,
                        "special": True,
                    }
                },
            }
        },
    ),
    "other special tokens": (
        {},
        {
            "tokenizer_config__json": {
                "tokenizer_class": "BertTokenizer",
                "cls_token": "我",
                "sep_token": ".",
            }
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_word_piece(case: str, tmp_path: Path) -> None:
    config, files = CASES[case]
    directory = source(tmp_path, config, vocab__txt=VOCAB, **files)
    out, notes = converted(directory, tmp_path)
    assert [note for note in notes if "padded" not in note] == []
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    whole = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert type(loaded) is type(reference) is transformers.BertTokenizer
    for text in TEXTS:
        expected = reference(text)["input_ids"]
        assert loaded(text)["input_ids"] == expected, text
        assert whole.encode(text).ids == expected, text
        assert loaded.decode(expected) == reference.decode(expected)
    assert whole.encode("我", "是").type_ids == reference("我", "是")["token_type_ids"]
    assert (out / "vocab.txt").read_text() == VOCAB
    assert all(b"/home/me" not in path.read_bytes() for path in out.glob("*.json"))


def test_line_endings_of_windows_and_repeated_tokens(tmp_path: Path) -> None:
    directory = source(
        tmp_path, {"tokenizer_class": "BertTokenizer"}, vocab__txt=VOCAB.replace("\n", "\r\n") + "我\r\n"
    )
    out, _ = converted(directory, tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    whole = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in TEXTS:
        assert whole.encode(text).ids == reference(text)["input_ids"]


NOT_EXACT: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "no class": ({}, {"vocab__txt": VOCAB}, "neither tokenizer_config.json nor config.json states a tokenizer_class"),
    "sentencepiece": (
        {"tokenizer_class": "T5Tokenizer"},
        {"spiece__model": "\x01binary"},
        "T5Tokenizer has no exact",
    ),
    "gpt-sw3": (
        {},
        {"spiece__model": "\x01", "tokenizer_config__json": {"tokenizer_class": "GPTSw3Tokenizer"}},
        "Sw3",
    ),
    "jieba": (
        {"tokenizer_class": "CpmTokenizer"},
        {"vocab__txt": VOCAB, "spiece__model": "\x01"},
        "CpmTokenizer has",
    ),
    "roberta": ({"tokenizer_class": "RobertaTokenizer"}, {"vocab__json": {"a": 0}, "merges__txt": ""}, "RobertaTok"),
    "code": (
        {},
        {
            "vocab__txt": VOCAB,
            "tokenizer_config__json": {"tokenizer_class": "MyTokenizer", "auto_map": {"A": ["b.C", None]}},
        },
        "MyTokenizer is Python code",
    ),
    "no basic tokens": (
        {},
        {
            "vocab__txt": VOCAB,
            "tokenizer_config__json": {"tokenizer_class": "BertTokenizer", "do_basic_tokenize": False},
        },
        "does not implement do_basic_tokenize",
    ),
    "no unknown token": (
        {"tokenizer_class": "BertTokenizer"},
        {"vocab__txt": VOCAB.replace("[UNK]", "x")},
        "the vocabulary lacks [UNK]",
    ),
    "token with a space": (
        {"tokenizer_class": "BertTokenizer"},
        {"vocab__txt": VOCAB, "special_tokens_map__json": {"cls_token": "a b"}},
        "cannot be put around texts",
    ),
    "gap": (
        {"tokenizer_class": "BertTokenizer"},
        {"vocab__txt": VOCAB, "added_tokens__json": {"[X]": len(WORDS) + 3}},
        "gaps in their ids",
    ),
}


@pytest.mark.parametrize("case", NOT_EXACT)
def test_what_has_no_exact_form_is_copied_and_noted(case: str, tmp_path: Path) -> None:
    config, files, reason = NOT_EXACT[case]
    directory = source(tmp_path, config, **files)
    out, notes = converted(directory, tmp_path)
    assert len(notes) == 1
    assert reason in notes[0]
    assert "no tokenizer files" not in notes[0]
    assert not (out / "tokenizer.json").exists()
    for name in (name.replace("__", ".") for name in files):
        assert (out / name).read_bytes() == (directory / name).read_bytes()
    assert json.loads((out / "config.json").read_text()).get("tokenizer_class") == config.get("tokenizer_class")


def test_a_chat_template_is_copied(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}\r\n{% endfor %}"
    trained = FIXTURES / "gpt2-stdlib"
    pair = {"vocab__json": (trained / "encoder.json").read_text(), "merges__txt": (trained / "vocab.bpe").read_text()}
    directory = source(tmp_path, None, chat_template__jinja=template, **pair)
    out, _ = converted(directory, tmp_path)
    assert (out / "chat_template.jinja").read_bytes() == template.encode()
    messages = [{"role": "user", "content": "def f"}]
    first, second = (
        transformers.AutoTokenizer.from_pretrained(path).apply_chat_template(messages) for path in (directory, out)
    )
    assert first == second


def test_a_chat_template_without_a_tokenizer(tmp_path: Path) -> None:
    out, notes = converted(source(tmp_path, None, chat_template__jinja="x"), tmp_path)
    assert (out / "chat_template.jinja").read_bytes() == b"x"
    assert notes == ("the checkpoint has no tokenizer files: none were written",)


def test_slow_files_beside_tokenizer_json_are_copied(tmp_path: Path) -> None:
    directory = source(tmp_path, {"tokenizer_class": "BertTokenizer"}, vocab__txt=VOCAB)
    first, _ = converted(directory, tmp_path)
    shutil.copy(first / "tokenizer.json", directory)
    shutil.rmtree(first)
    out, _ = converted(directory, tmp_path)
    assert (out / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert (out / "vocab.txt").read_text() == VOCAB


def test_openais_names_in_a_hugging_face_directory(tmp_path: Path) -> None:
    trained = FIXTURES / "gpt2-stdlib"
    pair = {
        "encoder__json": (trained / "encoder.json").read_text(),
        "vocab__bpe": (trained / "vocab.bpe").read_text(),
    }
    out, notes = converted(source(tmp_path, None, **pair), tmp_path)
    assert not any("no tokenizer files" in note for note in notes)
    assert (out / "vocab.json").read_bytes() == (trained / "encoder.json").read_bytes()
    (tmp_path / "reference").mkdir()
    shutil.copy(trained / "encoder.json", tmp_path / "reference" / "vocab.json")
    shutil.copy(trained / "vocab.bpe", tmp_path / "reference" / "merges.txt")
    reference = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "reference")
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == reference(text)["input_ids"]


def test_transformers_names_win_over_openais(tmp_path: Path) -> None:
    """AutoTokenizer reads vocab.json and merges.txt."""
    trained = FIXTURES / "gpt2-stdlib"
    pair = {"vocab__json": (trained / "encoder.json").read_text(), "merges__txt": (trained / "vocab.bpe").read_text()}
    out, _ = converted(source(tmp_path, None, encoder__json={"a": 0}, vocab__bpe="x", **pair), tmp_path)
    assert (out / "vocab.json").read_bytes() == (trained / "encoder.json").read_bytes()


def test_a_class_of_the_other_kind_of_bpe_decides(tmp_path: Path) -> None:
    """A GPT-1 fine-tuned with GPT-2's tokenizer, say."""
    trained = FIXTURES / "gpt2-stdlib"
    found = {"vocab.json": str(trained / "encoder.json"), "merges.txt": str(trained / "vocab.bpe")}
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "OpenAIGPTTokenizer"}')
    files, _ = tokenizer_files(checkpoint_of(*tiny_gpt2(), tokenizer={**found, config.name: str(config)}))
    assert json.loads(files["tokenizer.json"])["model"]["end_of_word_suffix"] == "</w>"


ENDS: dict[str, dict[str, object]] = {
    "bos": {"add_bos_token": True},
    "eos": {"add_eos_token": True},
    "both": {"add_bos_token": True, "add_eos_token": True},
    "neither": {"add_bos_token": False},
    "other token": {"add_bos_token": True, "bos_token": "d"},
    "no token": {"add_bos_token": True, "bos_token": None},
}


@pytest.mark.parametrize("case", ENDS)
def test_tokens_added_around_each_text(case: str, tmp_path: Path) -> None:
    trained = FIXTURES / "gpt2-stdlib"
    pair = {"vocab__json": (trained / "encoder.json").read_text(), "merges__txt": (trained / "vocab.bpe").read_text()}
    settings = {"tokenizer_class": "GPT2Tokenizer", **ENDS[case]}
    directory = source(tmp_path, None, tokenizer_config__json=settings, **pair)
    out, _ = converted(directory, tmp_path)
    reference: Any = transformers.AutoTokenizer.from_pretrained(directory)
    loaded: Any = transformers.AutoTokenizer.from_pretrained(out)
    whole = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in ("def f(x):", ""):
        expected = reference(text)["input_ids"]
        assert whole.encode(text).ids == expected
        assert loaded(text)["input_ids"] == expected
    assert whole.encode("def", "f").ids == reference("def", "f")["input_ids"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab__txt": ""}, "no tokens"),
        ({"vocab__txt": VOCAB, "added_tokens__json": ["x"]}, "added tokens holds the wrong kind of value"),
        ({"vocab__txt": VOCAB, "added_tokens__json": {"x": -1}}, "invalid added tokens"),
    ],
)
def test_corrupt_files(files: dict[str, object], message: str, tmp_path: Path) -> None:
    directory = source(tmp_path, {"tokenizer_class": "BertTokenizer"}, **files)
    with pytest.raises(InputError, match=message):
        converted(directory, tmp_path)


def test_settings_of_wrong_types_count_as_absent(tmp_path: Path) -> None:
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": "yes",
        "strip_accents": 7,
        "additional_special_tokens": 3,
        "added_tokens_decoder": {
            "22": {"content": "[X]", "lstrip": "?"},
            "x": {},
            "9" * 5000: {"content": "y"},
            "5": 1,
        },
    }
    out, _ = converted(source(tmp_path, None, vocab__txt=VOCAB, tokenizer_config__json=settings), tmp_path)
    assert tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).encode("HEL [X]").ids == [2, 12, 22, 3]


def test_a_vocabulary_that_is_not_text(tmp_path: Path) -> None:
    directory = source(tmp_path, {"tokenizer_class": "BertTokenizer"})
    (directory / "vocab.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        converted(directory, tmp_path)


def test_the_total_size_of_copied_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_foreign, "MAX_BYTES", 100)
    found = {}
    for name in ("a.bpe.model", "b.bpe.model"):
        (tmp_path / name).write_bytes(bytes(60))
        found[name] = str(tmp_path / name)
    assert len(tokenizer_foreign.copied_files({"a.bpe.model": found["a.bpe.model"]})) == 1
    with pytest.raises(InputError, match="too large for the tokenizer's files"):
        tokenizer_foreign.copied_files(found)
