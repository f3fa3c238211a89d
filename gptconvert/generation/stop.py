"""Texts that end a continuation."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Stop:
    """The stop texts of one prompt.

    Args:
        texts: the continuation ends before any of these.
        decode: new ids → new text.

    Attributes:
        found: whether a streamed continuation has ended with one.
    """

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self.texts, self._decode, self.found = tuple(texts), decode, False

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether the text of new ids contains one."""
        return self.cut(self._decode(ids))[1]

    def cut(self, text: str) -> tuple[str, bool]:
        """The text before the first of them, and whether there is one."""
        places = [place for place in map(text.find, self.texts) if place >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def certain(self, text: str) -> int:
        """How much of a text can be shown: its end may be the beginning of a stop text."""
        most = max(map(len, self.texts), default=1) - 1
        for length in range(min(most, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.texts):
                return len(text) - length
        return len(text)
