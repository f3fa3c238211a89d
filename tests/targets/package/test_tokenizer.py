"""Tokenizer files compared with transformers' GPT-2 tokenizer and a plain implementation of OpenAI's algorithm."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptconvert.errors import InputError, UnsafeInputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.targets.package.tokenizer import end_token_id, parse_merges, tokenizer_files
from tests.helpers import FIXTURES, NO_RELEASED_FILES, REAL_GPT2, checkpoint_of, tiny_gpt2

END = "<|endoftext|>"
PUBLISHED = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
CORPUS = [
    "",
    " ",
    "  ",
    "Hello world",
    " Hello  world ",
    "I'm you're he's we've they'll I'd can't 'tis 'Twas",
    "I'M YOU'RE HE'S WE'VE THEY'LL I'D CAN'T",
    "don’t ‘quote’ “double” — dash – en … ellipsis",
    "naïve café Ångström ÆØÅ ß ſ ﬁ ŉ",
    "e\u0301 a\u0308\u0323 n\u0303o\u0308 \u0301alone Z\u0351\u036b\u0343",
    "日本語のテキスト 汉字 漢字 한국어 조합형 ㄱㄴㄷ",
    "Привет, мир! Ελληνικά שָׁלוֹם مرحبا नमस्ते ไทย ქართული",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☃️ \U0001f9ff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 ½ ² ⅷ Ⅷ ① 一二三 ٣٤٥ १२३",
    "a\tb\t\tc\n\nd \n e\r\nf\r \t \n",
    "x" + " " * 40 + "y" + "\n" * 17 + "\t" * 9,
    "\u00a0nbsp\u00a0\u00a0 \u2003em\u3000ideographic \u200bzero \ufeffbom \u2028line\u2029par\u0085nel",
    "null\x00 bell\x07 esc\x1b[0m del\x7f \x01\x02\x03 \x80\x9f",
    "fs\x1c gs \x1d\x1d rs\x1e\x1e us \x1f x\x0b\x0cy \x85\x85",
    "1234567890 3.14159 1,000,000 0x1F 10^100 " + "9" * 60,
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # comment\n\n\tif x != 'y': pass\n",
    "##  ####  # $ ## ## ######## ################",
    "https://example.org/a?b=c&d=%20#frag user@example.com",
    "ĠĊ are letters here, Ġ too, and <|endoftext is not special |>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa hahahahahahaha \\\\\\\\ ======== -------",
    "\ud7ff\ue000\ufffd\ufffe\U0010fffd",
]
WITH_END = [
    END,
    f"a{END}b",
    f"a {END} b",
    f"{END}{END} {END}\n",
    f"one.\n{END}\nTwo",
    f"<{END}> <|endoftext|",
    f"I'm{END}'m",
]


def files_of(directory: Path) -> dict[str, str]:
    return {path.name: str(path) for path in directory.iterdir() if path.suffix in (".json", ".bpe", ".txt")}


def with_tokenizer(found: dict[str, str], n_vocab: int = 97) -> Checkpoint:
    return checkpoint_of(*tiny_gpt2(vocab_size=n_vocab), tokenizer=found)


def write_all(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture(scope="module", params=["real", "stdlib"])
def released(request: pytest.FixtureRequest) -> dict[str, str]:
    """encoder.json and vocab.bpe: OpenAI's, and a small pair of the same form."""
    directory = REAL_GPT2 if request.param == "real" else FIXTURES / "gpt2-stdlib"
    if not (directory / "vocab.bpe").exists():
        pytest.skip(NO_RELEASED_FILES)
    return {name: str(directory / name) for name in ("encoder.json", "vocab.bpe")}


@pytest.fixture(scope="module")
def published(released: dict[str, str]) -> dict[str, bytes]:
    n_vocab = len(json.loads(Path(released["encoder.json"]).read_bytes()))
    files, notes = tokenizer_files(with_tokenizer(released, n_vocab))
    assert notes == ()
    return files


@pytest.fixture(scope="module")
def converted(published: dict[str, bytes]) -> Any:
    return tokenizers.Tokenizer.from_str(published["tokenizer.json"].decode())


@pytest.fixture(scope="module")
def reference(released: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer from the two released files, under Hugging Face's names."""
    directory = tmp_path_factory.mktemp("reference")
    (directory / "vocab.json").write_bytes(Path(released["encoder.json"]).read_bytes())
    (directory / "merges.txt").write_bytes(Path(released["vocab.bpe"]).read_bytes())
    return transformers.GPT2TokenizerFast.from_pretrained(directory)


class Plain:
    """OpenAI's encoder, implemented from its description with only the ``regex`` module."""

    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, released: dict[str, str]) -> None:
        self.ids = json.loads(Path(released["encoder.json"]).read_text("utf-8"))
        lines = Path(released["vocab.bpe"]).read_text("utf-8").split("\n")[1:-1]
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [byte for byte in range(256) if byte not in printable]
        self.symbol = {byte: chr(byte) for byte in printable} | {b: chr(256 + n) for n, b in enumerate(hidden)}

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def word(self, word: str) -> tuple[int, ...]:
        parts = [self.symbol[byte] for byte in word.encode("utf-8")]
        while len(parts) > 1:
            rank, pair = min((self.ranks.get(p, sys.maxsize), p) for p in itertools.pairwise(parts))
            if rank == sys.maxsize:
                break
            merged, at = [], 0
            while at < len(parts):
                step = 2 if tuple(parts[at : at + 2]) == pair else 1
                merged.append("".join(parts[at : at + step]))
                at += step
            parts = merged
        return tuple(self.ids[part] for part in parts)

    def encode(self, text: str) -> list[int]:
        pieces = [[i for word in self.words.findall(piece) for i in self.word(word)] for piece in text.split(END)]
        return pieces[0] + [i for piece in pieces[1:] for i in [self.ids[END], *piece]]


@pytest.fixture(scope="module")
def plain(released: dict[str, str]) -> Plain:
    return Plain(released)


@pytest.mark.parametrize("text", CORPUS + WITH_END)
def test_ids_equal_those_of_transformers_and_of_openai(
    text: str, converted: Any, reference: Any, plain: Plain
) -> None:
    ids = converted.encode(text).ids
    assert ids == reference(text)["input_ids"]
    assert ids == plain.encode(text)
    assert converted.decode(ids, skip_special_tokens=False) == text


ASSIGNED = st.characters(exclude_categories=("Cs", "Cn", "Co")).filter(lambda c: unicodedata.category(c) != "Cn")


@given(st.text(ASSIGNED | st.sampled_from(" \t\n'strevmld0\u0301é<|>"), max_size=60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_equal_on_random_text(converted: Any, reference: Any, plain: Plain, text: str) -> None:
    ids = converted.encode(text).ids
    assert ids == reference(text)["input_ids"] == plain.encode(text)
    assert converted.decode(ids, skip_special_tokens=False) == text


def test_released_files_are_copied_byte_for_byte(released: dict[str, str], published: dict[str, bytes]) -> None:
    assert set(published) == PUBLISHED
    assert published["vocab.json"] == Path(released["encoder.json"]).read_bytes()
    assert published["merges.txt"] == Path(released["vocab.bpe"]).read_bytes()


@pytest.mark.parametrize("only_json", [False, True])
def test_transformers_loads_the_directory(
    only_json: bool, published: dict[str, bytes], reference: Any, tmp_path: Path
) -> None:
    files = {n: d for n, d in published.items() if not only_json or n.startswith("tokenizer")}
    raw, _ = tiny_gpt2()
    loaded = transformers.AutoTokenizer.from_pretrained(
        write_all(tmp_path, {**files, "config.json": json.dumps(raw).encode()})
    )
    assert type(loaded).__name__.startswith("GPT2Tokenizer")
    assert len(loaded) == len(reference)
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token, loaded.pad_token) == (END, END, END, None)
    assert loaded.model_max_length == 40
    for text in CORPUS + WITH_END:
        assert loaded(text)["input_ids"] == reference(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_the_three_forms_of_one_tokenizer_give_the_same_files(
    released: dict[str, str], published: dict[str, bytes], tmp_path: Path
) -> None:
    """OpenAI's two files, Hugging Face's two, and a lone tokenizer.json, from which both are derived."""
    directory = write_all(tmp_path, {name: data for name, data in published.items() if "token" not in name})
    assert tokenizer_files(with_tokenizer(files_of(directory), 10**5))[0] == published
    (tmp_path / "tokenizer.json").write_bytes(published["tokenizer.json"])
    derived, notes = tokenizer_files(with_tokenizer({"tokenizer.json": str(tmp_path / "tokenizer.json")}, 10**5))
    assert derived == published
    assert len(notes) == 1  # the padded vocabulary
    assert tokenizer_files(with_tokenizer(files_of(tmp_path), 10**5))[0] == published


def test_merges_are_strings_which_old_libraries_read(published: dict[str, bytes]) -> None:
    """tokenizers 0.15 (transformers 4.38) does not read pairs; every version reads strings."""
    merges = json.loads(published["tokenizer.json"])["model"]["merges"]
    assert "".join(f"{merge}\n" for merge in merges) == published["merges.txt"].decode().partition("\n")[2]


def test_tokenizer_json_with_merges_as_pairs(published: dict[str, bytes], tmp_path: Path) -> None:
    raw = json.loads(published["tokenizer.json"])
    raw["model"]["merges"] = [merge.split(" ") for merge in raw["model"]["merges"]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    files, _ = tokenizer_files(with_tokenizer({"tokenizer.json": str(path)}))
    assert files["tokenizer.json"] == path.read_bytes()
    assert files["merges.txt"] == published["merges.txt"]
    assert files["vocab.json"] == published["vocab.json"]


# A small tokenizer: the byte alphabet, four merges (two begin with #), the end token.

MERGES = [("t", "h"), ("#", "#"), ("##", "#"), ("th", "e")]


def small(directory: Path, **changes: bytes) -> dict[str, str]:
    """The small tokenizer in OpenAI's two files; ``changes`` (dots written ``__``) replace or add files."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *("".join(pair) for pair in MERGES), END]
    lines = "".join(f"{a} {b}\n" for a, b in MERGES)
    files = {
        "encoder.json": json.dumps({symbol: n for n, symbol in enumerate(symbols)}).encode(),
        "vocab.bpe": b"#version: 0.2\n" + lines.encode(),
    }
    files |= {name.replace("__", "."): data for name, data in changes.items()}
    write_all(directory, files)
    return {name: str(directory / name) for name in files}


SMALL_SIZE = 256 + len(MERGES) + 1
TEXT = "the ### th###e ##"


@pytest.mark.parametrize(
    "form",
    [
        b"t h\n# #\n## #\nth e\n",
        b"#version: 0.2\r\nt h\r\n# #\r\n## #\r\nth e\r\n",
        b"t h\r\n# #\r\n## #\r\nth e",
        b"\xef\xbb\xbf#version: 0.2\nt h\n# #\n## #\nth e\n",
        b"#version: 0.2\nt h\n# #\n## #\nth e",
        b"#version: 0.2\nt h\n# #\n## #\nth e\n\n",
    ],
)
def test_merges_files_of_every_form(form: bytes, tmp_path: Path) -> None:
    assert parse_merges(form, "vocab.bpe") == MERGES
    plainly, _ = tokenizer_files(with_tokenizer(small(tmp_path / "a"), SMALL_SIZE))
    files, notes = tokenizer_files(with_tokenizer(small(tmp_path / "b", vocab__bpe=form), SMALL_SIZE))
    if form.endswith(b"\n\n"):  # harmless, and so copied unchanged
        assert files["merges.txt"] == form
    else:
        assert files == plainly
        assert len(notes) == 1
        assert "merges.txt" in notes[0]


def test_only_newlines_end_a_merge() -> None:
    assert parse_merges("#version: 0.2\nt \x85\n\u2028 h\n".encode(), "vocab.bpe") == [("t", "\x85"), ("\u2028", "h")]


def test_the_end_token_is_special(tmp_path: Path) -> None:
    files, _ = tokenizer_files(with_tokenizer(small(tmp_path), SMALL_SIZE))
    loaded = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert loaded.decode(loaded.encode(f"the{END}").ids, skip_special_tokens=True) == "the"
    config = json.loads(files["tokenizer_config.json"])
    assert config["clean_up_tokenization_spaces"] is False  # transformers 4 would change "do n't"


def test_merges_that_begin_with_a_hash_are_merges(tmp_path: Path) -> None:
    files, _ = tokenizer_files(with_tokenizer(small(tmp_path), SMALL_SIZE))
    loaded = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert loaded.encode(TEXT).tokens == ["the", "Ġ", "###", "Ġ", "th", "###", "e", "Ġ", "##"]


CORRUPT = {
    "vocabulary is cut": ("encoder.json", b'{"a": 0, "b'),
    "vocabulary is a list": ("encoder.json", b'["a", "b"]'),
    "vocabulary is empty": ("encoder.json", b"{}"),
    "vocabulary file is empty": ("encoder.json", b""),
    "vocabulary is an LFS pointer": ("encoder.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "id is text": ("encoder.json", b'{"a": "0"}'),
    "id is true": ("encoder.json", b'{"a": true}'),
    "id is negative": ("encoder.json", b'{"a": -1}'),
    "id is huge": ("encoder.json", b'{"a": 4294967296}'),
    "id twice": ("encoder.json", b'{"a": 0, "b": 0}'),
    "symbol twice": ("encoder.json", b'{"a": 0, "a": 1}'),
    "merges not UTF-8": ("vocab.bpe", b"#version: 0.2\nt \xff\n"),
    "merges empty": ("vocab.bpe", b""),
    "merges only a version": ("vocab.bpe", b"#version: 0.2\n"),
    "merge of three": ("vocab.bpe", b"#version: 0.2\nt h e\n"),
    "merge of one": ("vocab.bpe", b"#version: 0.2\nt h\nth\n"),
    "blank line inside": ("vocab.bpe", b"#version: 0.2\nt h\n\nth e\n"),
    "foreign merges": ("vocab.bpe", b"#version: 0.2\nt h\nq u\n"),
    "merge cut off": ("vocab.bpe", b"#version: 0.2\nt h\nth "),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_errors_name_corrupt_files(case: str, tmp_path: Path) -> None:
    name, data = CORRUPT[case]
    found = small(tmp_path, **{name.replace(".", "__"): data})
    with pytest.raises(InputError) as caught:
        tokenizer_files(with_tokenizer(found))
    assert caught.value.path == found[name]
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b'{"version": "1.0"}', b"<html>", b'{"model": {"type": "BPE", "vocab": {"a": "b"}}}']
)
def test_error_names_corrupt_tokenizer_json(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        tokenizer_files(with_tokenizer({"tokenizer.json": str(path)}))
    assert caught.value.path == str(path)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    import os

    found = small(tmp_path)
    Path(found["vocab.bpe"]).unlink()
    os.mkfifo(found["vocab.bpe"])
    with pytest.raises(UnsafeInputError):
        tokenizer_files(with_tokenizer(found))


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (("encoder.json", "vocab.bpe"), "no tokenizer files"),
        (("encoder.json",), "vocab.json"),
        (("vocab.bpe",), "merges.txt"),
    ],
)
def test_missing_tokenizer_is_noted(missing: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    found = {name: path for name, path in small(tmp_path).items() if name not in missing}
    files, notes = tokenizer_files(with_tokenizer(found))
    assert files == {}
    assert len(notes) == 1
    assert expected in notes[0]


@pytest.mark.parametrize(
    ("n_vocab", "expected"), [(SMALL_SIZE, None), (SMALL_SIZE + 3, "padded"), (SMALL_SIZE - 1, "will fail")]
)
def test_vocabulary_of_another_size_is_noted(n_vocab: int, expected: str | None, tmp_path: Path) -> None:
    files, notes = tokenizer_files(with_tokenizer(small(tmp_path), n_vocab))
    assert set(files) == PUBLISHED
    assert [expected in note for note in notes] == ([] if expected is None else [True])


def test_tokens_added_in_fine_tuning_keep_their_ids(tmp_path: Path) -> None:
    added = {"<pad>": SMALL_SIZE, "<name>": SMALL_SIZE + 1}
    found = small(
        tmp_path,
        added_tokens__json=json.dumps(added).encode(),
        special_tokens_map__json=json.dumps({"pad_token": {"content": "<pad>", "lstrip": False}}).encode(),
        tokenizer_config__json=json.dumps({"name_or_path": "/home/me/run", "model_max_length": 7}).encode(),
    )
    files, notes = tokenizer_files(with_tokenizer(found, SMALL_SIZE + 2))
    assert notes == ()
    config = json.loads(files["tokenizer_config.json"])
    assert config["pad_token"] == "<pad>"
    assert config["model_max_length"] == 7
    assert b"/home" not in b"".join(files.values())
    loaded = transformers.AutoTokenizer.from_pretrained(write_all(tmp_path / "out", files))
    source = write_all(tmp_path / "hf", {n: Path(p).read_bytes() for n, p in found.items()})
    (source / "encoder.json").rename(source / "vocab.json")
    (source / "vocab.bpe").rename(source / "merges.txt")
    witness = transformers.GPT2TokenizerFast.from_pretrained(source)
    text = f"the<pad>the <name>{END} ###"
    assert loaded(text)["input_ids"] == witness(text)["input_ids"]
    assert added["<pad>"] in loaded(text)["input_ids"]
    assert loaded.pad_token_id == SMALL_SIZE
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == "thethe <name> ###"


def test_added_tokens_with_a_gap_are_refused(tmp_path: Path) -> None:
    found = small(tmp_path, added_tokens__json=json.dumps({"<x>": SMALL_SIZE + 5}).encode())
    with pytest.raises(InputError) as caught:
        tokenizer_files(with_tokenizer(found))
    assert caught.value.path == found["added_tokens.json"]
    assert caught.value.item == "<x>"


def test_vocabulary_without_an_end_token(tmp_path: Path) -> None:
    symbols = json.loads(Path(small(tmp_path)["encoder.json"]).read_text())
    del symbols[END]
    checkpoint = with_tokenizer(small(tmp_path, encoder__json=json.dumps(symbols).encode()), len(symbols))
    files, notes = tokenizer_files(checkpoint)
    assert len(notes) == 1
    assert "end-of-text" in notes[0]
    assert end_token_id(checkpoint, files) is None
    loaded = transformers.AutoTokenizer.from_pretrained(write_all(tmp_path / "out", files))
    assert len(loaded) == len(symbols)
    assert max(loaded(f"the {END}")["input_ids"]) < len(symbols)


def test_symbols_missing_from_the_alphabet_are_noted(tmp_path: Path) -> None:
    symbols = json.loads(Path(small(tmp_path)["encoder.json"]).read_text())
    del symbols["é"]
    found = small(tmp_path, encoder__json=json.dumps(symbols).encode())
    _, notes = tokenizer_files(with_tokenizer(found, SMALL_SIZE))
    assert [note.startswith("1 symbols of the alphabet") for note in notes] == [True]


def test_disagreeing_files_follow_tokenizer_json(tmp_path: Path) -> None:
    files, _ = tokenizer_files(with_tokenizer(small(tmp_path), SMALL_SIZE))
    swapped = b"#version: 0.2\nt h\nth e\n# #\n## #\n"
    found = small(tmp_path, vocab__bpe=swapped, tokenizer__json=files["tokenizer.json"])
    again, notes = tokenizer_files(with_tokenizer(found, SMALL_SIZE))
    assert again == files
    assert len(notes) == 1
    assert "disagrees" in notes[0]


def test_other_tokenizers_are_copied(tmp_path: Path) -> None:
    model = tokenizers.models.Unigram([("<unk>", 0.0), ("the", -1.0), ("t", -2.0)], 0, False)
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(model).save(str(path))
    files, notes = tokenizer_files(with_tokenizer({"tokenizer.json": str(path)}, 3))
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert files["tokenizer.json"] == path.read_bytes()
    assert "Unigram" in notes[0]
