"""Text to measure or calibrate a model on: where it comes from, and its windows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gptconvert.containers.untrusted import read_small
from gptconvert.errors import InputError
from gptconvert.verify.probes import Integers

#: Largest text file in bytes, and how many of its characters are used: tokens take much more memory than text.
MAX_TEXT, MOST_USED = 64 << 20, 1 << 20

#: Returns the ids of a whole text, without special tokens. Raises InputError if the tokenizer cannot be used.
Encoder = Callable[[str], Integers]


def reference_text() -> str:
    """The language reference in CPython's help topics: English prose with code, about 465 kB."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def read_text(path: str) -> str:
    """The beginning of a text file.

    Raises:
        InputError: it cannot be read, is empty, too large or not UTF-8.
    """
    try:
        text = read_small(path, MAX_TEXT, "a text").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            "the text is not UTF-8",
            path=path,
            found=f"{error.reason} at byte {error.start}",
            hint="convert it: iconv -f latin1 -t utf-8",
        ) from None
    if not text.strip():
        raise InputError("the text is empty", path=path)
    return text[:MOST_USED]


def evenly_spaced(ids: Integers, count: int, length: int) -> Sequence[Integers]:
    """Up to ``count`` windows of ``length`` tokens that do not overlap; one shorter window of fewer tokens."""
    count = max(1, min(count, len(ids) // length))
    starts = np.linspace(0, max(0, len(ids) - length), count).astype(int)
    return [ids[start : start + length] for start in starts if len(ids)]
