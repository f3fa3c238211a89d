"""A checkpoint format: how it is recognised and opened, and which options it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gptconvert.errors import UsageError
from gptconvert.model.options import Options
from gptconvert.model.source import Source

#: Options that apply to every format.
ALWAYS = frozenset({"cache_dir", "offline", "task", "trim_vocab"})


@dataclass(frozen=True)
class Format:
    """One checkpoint format.

    Attributes:
        name: the naming scheme and, where it has one, the command (``openai-tf``, ``hf``).
        title: for people.
        recognises: whether this local path looks like the format, judged cheaply (names, magic bytes).
        read: reads headers and returns the :class:`Source`. Call :meth:`open`, which checks the options first.
        accepts: names of the options that it reads, besides those in :data:`ALWAYS`.
    """

    name: str
    title: str
    recognises: Callable[[str], bool]
    read: Callable[[str, Options], Source]
    accepts: frozenset[str] = frozenset()

    def open(self, path: str, options: Options) -> Source:
        """The checkpoint at ``path``, headers read.

        Raises:
            UsageError: options that this format does not read; all are named.
            GptConvertError: as the format's reader.
        """
        ignored = [i.flag for n, i in options.given("source", "checkpoint").items() if n not in self.accepts | ALWAYS]
        if ignored:
            raise UsageError(f"{', '.join(ignored)} does not apply to {self.title} files", path=path)
        return self.read(path, options)
