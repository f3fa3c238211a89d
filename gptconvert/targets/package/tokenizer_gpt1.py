"""GPT-1's original way from text to tokens: ftfy mends the text, spaCy cuts it into words, BPE splits the words.

``tokenizer.json`` cuts by other rules, as transformers does, because no tokenizer library knows spaCy's; how far the
two differ is in docs/tokenizers.md. Needs the packages of the extra ``gpt1-tokenizer``; nothing else here does.

Source: openai/finetune-transformer-lm ``text_utils.py``, which used ftfy 4.4 and spaCy 2.0. Of spaCy's English model
it used the tokenizer alone, which is rules without weights, so no model has to be downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.targets.package.tokenizer_kinds import WORD_END

EXTRA = "gpt1-tokenizer"
#: Characters that the training text was not to have.
REPLACED = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
#: Runs of one of these become words. The backslash is not among them: the original means it to be, but its pattern
#: is no raw string, so what it says of the backslash reads as one more plus sign.
RUNS = re.compile(r"""([-~!";?+,()/*\[\]{}|_])\1*""")
#: How spaCy returns the newline between two lines, with the space that follows it.
NEWLINE_AND_SPACE = "\n "


def standardise(text: str) -> str:
    """Dashes and dots in ASCII, punctuation apart from words, one space between words, lone newlines."""
    spaced = RUNS.sub(r" \g<0> ", text.translate(REPLACED))
    lines = re.sub(r"\s*\n\s*", " \n ", spaced)
    return re.sub(r"[^\S\n]+", " ", lines).strip()


class OriginalTokenizer:
    """Text → token ids, as OpenAI's code prepared GPT-1's training text.

    Args:
        path: GPT-1's ``tokenizer.json``, as this project or transformers writes it.

    Raises:
        InputError: the file is not GPT-1's tokenizer.
        UnsupportedError: ftfy or spaCy is not installed.
    """

    def __init__(self, path: str) -> None:
        self._fix, self._cut = _fix_and_cut()
        self._model = _word_model(path)

    def words(self, text: str) -> list[str]:
        """The words, marks and newlines of ``text``, in lower case."""
        cut = (token.text for token in self._cut(standardise(self._fix(text))))
        return ["\n" if word == NEWLINE_AND_SPACE else word.lower() for word in cut]

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; what the vocabulary cannot write is ``<unk>``."""
        return [piece.id for word in self.words(text) for piece in self._model.tokenize(word)]


def _fix_and_cut() -> tuple[Callable[[str], str], Callable[[str], Any]]:
    """ftfy's ``fix_text`` and spaCy's English tokenizer."""
    try:
        from ftfy import fix_text
        from spacy.lang.en import English
    except ImportError as error:
        raise UnsupportedError(
            f"GPT-1's original tokenization needs the package {error.name}", hint=f"pip install 'gptconvert[{EXTRA}]'"
        ) from error
    return fix_text, English().tokenizer


def _word_model(path: str) -> Any:
    """The BPE of a tokenizer file, without the rules that cut text into words."""
    from tokenizers import Tokenizer

    try:
        model = Tokenizer.from_file(path).model
    except Exception as error:  # the library raises no narrower class
        raise InputError(f"not a tokenizer: {error}", path=path) from error
    suffix = getattr(model, "end_of_word_suffix", None)
    if suffix != WORD_END:
        raise InputError("not GPT-1's tokenizer", path=path, expected=f"words that end in {WORD_END}", found=suffix)
    return model
