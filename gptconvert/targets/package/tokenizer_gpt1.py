"""GPT-1's original tokenization: ftfy repairs the text, spaCy splits it into words, BPE splits the words.

``tokenizer.json`` uses other rules, as transformers does, because the tokenizers library does not implement
spaCy's; docs/tokenizers.md shows the differences. Only this module needs the extra ``gpt1-tokenizer``.

Source: openai/finetune-transformer-lm ``text_utils.py``, which used ftfy 4.4 and spaCy 2.0. It used only the
tokenizer of spaCy's English model, which consists of rules, so that no model needs to be downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from gptconvert.containers.json import read_json_object
from gptconvert.errors import InputError, UnsupportedError, install_hint
from gptconvert.targets.package.tokenizer import stored_bpe
from gptconvert.targets.package.tokenizer_kinds import MAX_BYTES, MAX_VALUES, WORD_END

#: Characters replaced in the training text.
REPLACED = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
#: Runs of one of these characters become words. The original also lists the backslash, but since its pattern is not a
#: raw string, the backslash merely escapes the plus sign.
RUNS = re.compile(r"""([-~!";?+,()/*\[\]{}|_])\1*""")
#: spaCy's token for a newline between lines, including the space after it.
NEWLINE_AND_SPACE = "\n "


def standardise(text: str) -> str:
    """Replace dashes and ellipses with ASCII, space out punctuation, and collapse white space and newlines."""
    spaced = RUNS.sub(r" \g<0> ", text.translate(REPLACED))
    lines = re.sub(r"\s*\n\s*", " \n ", spaced)
    return re.sub(r"[^\S\n]+", " ", lines).strip()


class OriginalTokenizer:
    """Text → token ids, as OpenAI's code prepared GPT-1's training text.

    Args:
        path: GPT-1's ``tokenizer.json``, written by this project or transformers.

    Raises:
        InputError: the file is not GPT-1's tokenizer.
        UnsupportedError: ftfy or spaCy is not installed.
    """

    def __init__(self, path: str) -> None:
        self._fix, self._split = _fix_and_split()
        self._model = _word_model(path)

    def words(self, text: str) -> list[str]:
        """The words, punctuation marks and newlines of ``text``, in lower case."""
        tokens = (token.text for token in self._split(standardise(self._fix(text))))
        return ["\n" if word == NEWLINE_AND_SPACE else word.lower() for word in tokens]

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; symbols outside the vocabulary become ``<unk>``."""
        return [piece.id for word in self.words(text) for piece in self._model.tokenize(word)]


def _fix_and_split() -> tuple[Callable[[str], str], Callable[[str], Any]]:
    """ftfy's ``fix_text`` and spaCy's English tokenizer."""
    try:
        from ftfy import fix_text
        from spacy.lang.en import English
    except ImportError as error:
        raise UnsupportedError(
            f"GPT-1's original tokenization needs the package {error.name}", hint=install_hint("gpt1-tokenizer")
        ) from error
    return fix_text, English().tokenizer


def _word_model(path: str) -> Any:
    """The BPE of a tokenizer file, without its rules for splitting text into words."""
    from tokenizers import models

    raw: Any = read_json_object(path, MAX_BYTES, "tokenizer.json", MAX_VALUES).get("model")
    suffix = raw.get("end_of_word_suffix") if isinstance(raw, dict) else None
    if suffix != WORD_END:
        raise InputError("not GPT-1's tokenizer", path=path, expected=f"words that end in {WORD_END}", found=suffix)
    vocabulary, merges = stored_bpe(raw, path)
    stated = raw.get("unk_token")
    unknown = stated if isinstance(stated, str) and stated in vocabulary else None
    lacking = next((a + b for a, b in merges if a + b not in vocabulary), None)
    if lacking is not None:  # the library would panic
        raise InputError("a merged symbol is not in the vocabulary", path=path, found=lacking)
    return models.BPE(vocabulary, merges, end_of_word_suffix=WORD_END, unk_token=unknown)
