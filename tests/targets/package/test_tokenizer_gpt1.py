"""GPT-1's original tokenization with ftfy and spaCy, from the extra ``gpt1-tokenizer``.

They take about 200 MB, so ``make test`` does not install them, and tests that need them are skipped without them:
``pip install 'gptconvert[gpt1-tokenizer]'`` runs it all.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import tokenizers

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.targets.package.tokenizer import tokenizer_files
from gptconvert.targets.package.tokenizer_gpt1 import OriginalTokenizer, _word_model, standardise
from tests.helpers import NO_RELEASED_FILES, ROOT
from tests.targets.package.test_tokenizer_word_end import gpt1
from tests.targets.package.word_end import MERGES, NEWLINE, OPENAI, REAL, UNKNOWN, symbols, write_pair

needs_the_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ftfy", "spacy")),
    reason="ftfy and spaCy are not installed: pip install 'gptconvert[gpt1-tokenizer]'",
)


def written(checkpoint: Checkpoint, directory: Path) -> str:
    path = directory / "tokenizer.json"
    path.write_bytes(tokenizer_files(checkpoint)[0]["tokenizer.json"])
    return str(path)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("odd")
    return written(gpt1(write_pair(directory)), directory)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not REAL.exists():
        pytest.skip(NO_RELEASED_FILES)
    return written(gpt1({name: str(REAL / name) for name in OPENAI}, 40478), tmp_path_factory.mktemp("real"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("  a \t b\u00a0\u2003c ", "a b c"),
        ("one\n\n \n two\r\nthree\n", "one \n two \n three"),
        ("yes—no–maybe―so…", "yes - no - maybe - so..."),
        ("rock ´n´ roll", "rock 'n' roll"),
        ("a--b-c", "a -- b - c"),
        ("--!!-!", "-- !! - !"),
        ('say "hi", (now) [x] {y}', 'say " hi " , ( now ) [ x ] { y }'),
        ("a;b?c+d/e*f|g_h~i", "a ; b ? c + d / e * f | g _ h ~ i"),
        ("C:\\dir \\\\x", "C:\\dir \\\\x"),  # as the original behaves, unlike its pattern suggests
        ("it's 3.5: a.b @c #d $e %f ^g &h =i <j> `k`", "it's 3.5: a.b @c #d $e %f ^g &h =i <j> `k`"),
    ],
)
def test_standardised_text(text: str, expected: str) -> None:
    assert standardise(text) == expected


@pytest.mark.parametrize("missing", ["ftfy", "spacy"])
def test_the_extra_is_named(missing: str, odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UnsupportedError) as caught:
        OriginalTokenizer(odd)
    assert "pip install 'ftfy>=6.1' 'spacy>=3.7'" in str(caught.value.hint)


def test_the_extra_exists() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name.split(">")[0] for name in extras["gpt1-tokenizer"]} == {"ftfy", "spacy"}


class Words:
    """Replace ftfy and spaCy, which may be absent: split text at single spaces."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def cut(cls, text: str) -> list[Words]:
        return [cls(word) for word in text.split(" ") if word]


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptconvert.targets.package.tokenizer_gpt1._fix_and_split", lambda: (str, Words.cut))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The THE the", ["the</w>"] * 3),
        ("in\n\na", ["i", "n</w>", NEWLINE, "a</w>"]),
        ("don't n't", ["d", "o", "n't</w>", "n't</w>"]),
        ("aaa aaaa", ["aa", "a</w>", "aaa", "a</w>"]),
        ("### ##", ["###</w>", "#", "#</w>"]),
        ("é日€x", ["é", "日", UNKNOWN, "x</w>"]),
        ("€", [UNKNOWN]),
        ("is (the)", ["i", "s</w>", UNKNOWN, "the</w>", UNKNOWN]),
    ],
)
def test_ids_of_words(text: str, pieces: list[str], odd: str, simple: None) -> None:
    assert OriginalTokenizer(odd).encode(text) == [symbols()[piece] for piece in pieces]


def test_other_tokenizers_are_refused(tmp_path: Path, simple: None) -> None:
    broken, other = tmp_path / "a.json", tmp_path / "b.json"
    broken.write_text("{")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(other))
    for path in (broken, other, tmp_path / "c.json"):
        with pytest.raises(InputError) as caught:
            OriginalTokenizer(str(path))
        assert caught.value.path == str(path)


#: text → its words, and whether tokenizer.json gives the same ids. Also in docs/tokenizers.md.
EXAMPLES: list[tuple[str, str, bool]] = [
    ("Hello world, how are you?", "hello world , how are you ?", True),
    ('"well-known" facts', '" well - known " facts', True),
    ("5 < 6 & 7 > 2", "5 < 6 & 7 > 2", True),
    ("I don't know.", "i do n't know .", False),
    ("the dog's bone", "the dog 's bone", False),
    ("a naïve café", "a naïve café", False),
    ("wait... what?", "wait ... what ?", False),
    ("she said — no", "she said - no", False),
    ("one.\n\nTwo.", "one . \n two .", False),
    ("it cost 3.50 at 10am", "it cost 3.50 at 10 am", False),
    ("the cafÃ©", "the café", False),
    ("ﬁne “curly” quotes", 'fine " curly " quotes', False),
]


@needs_the_extra
@pytest.mark.parametrize(("text", "words", "same"), EXAMPLES)
def test_examples(text: str, words: str, same: bool, real: str) -> None:
    original = OriginalTokenizer(real)
    assert original.words(text) == words.split(" ")
    assert (original.encode(text) == tokenizers.Tokenizer.from_file(real).encode(text).ids) == same


@needs_the_extra
def test_merges_as_openai_does(odd: str) -> None:
    """Merge every word by the rule of the paper: repeatedly merge the best pair present."""
    original, ranks, ids = OriginalTokenizer(odd), {pair: rank for rank, pair in enumerate(MERGES)}, symbols()
    text = "The other ring isn't there. Anything? Aaaaaa! ##### résumés 0101 日 € n't\nthther inging"
    expected = [ids.get(part, ids[UNKNOWN]) for word in original.words(text) for part in merged(word, ranks)]
    assert original.encode(text) == expected
    assert ids[UNKNOWN] in expected


def merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    parts = [*word[:-1], f"{word[-1]}</w>"]
    while True:
        pairs = [(ranks.get(pair, len(ranks)), n) for n, pair in enumerate(itertools.pairwise(parts))]
        rank, at = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return parts
        parts[at : at + 2] = ["".join(parts[at : at + 2])]


def test_documented_examples_are_those_tested() -> None:
    table = (ROOT / "docs" / "tokenizers.md").read_text("utf-8")
    for text, words, same in EXAMPLES:
        row = f"| {json.dumps(text, ensure_ascii=False)} | {json.dumps(words, ensure_ascii=False)} |"
        assert f"{row} {'yes' if same else 'no'} |" in table


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "BPE", "vocab": {"a": 0}, "merges": []}, "not GPT-1's tokenizer"),
        ({"end_of_word_suffix": "</w>", "vocab": {"a": 2**31}, "merges": []}, "invalid id"),
        ({"end_of_word_suffix": "</w>", "vocab": {"a": 0}, "merges": [["a", "b"]]}, "invalid merge"),
        ({"end_of_word_suffix": "</w>", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, "a merged symbol is not"),
        ({"end_of_word_suffix": "</w>", "vocab": []}, "no vocabulary or no merges"),
        (5, "not GPT-1's tokenizer"),
    ],
)
def test_the_library_reads_vocabulary_and_merges_alone(model: object, message: str, tmp_path: Path) -> None:
    """Other parts of the file can abort the process."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": model}))
    with pytest.raises(InputError, match=message):
        _word_model(str(path))
    table = base64.b64encode(b"\xff" * 68).decode()
    vocabulary = {"a": 0, "b</w>": 1, "ab</w>": 2}
    good = {"end_of_word_suffix": "</w>", "unk_token": "?", "vocab": vocabulary, "merges": ["a b</w>"]}
    normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
    path.write_text(json.dumps({"model": good, "normalizer": normalizer}))
    assert [piece.id for piece in _word_model(str(path)).tokenize("ab")] == [2]
