"""A checkpoint format: how it is recognised and opened, and which options it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from gptconvert.errors import UsageError
from gptconvert.model.options import Options
from gptconvert.model.source import Source

#: Options that apply to every format.
ALWAYS = frozenset({"cache_dir", "offline", "task", "trim_vocab"})

#: What a format has found out about a path when it is about to read the checkpoint.
Located = TypeVar("Located")


@dataclass(frozen=True)
class Format(Generic[Located]):
    """One checkpoint format.

    A path is located once, by ``locate`` where the format is to be detected and by ``find`` where the user named it;
    what that took (an index read, a pickle parsed) is handed to ``read``.

    Attributes:
        name: the naming scheme and, where it has one, the command (``openai-tf``, ``hf``).
        title: for people.
        locate: what ``read`` needs, or None where the path does not look like this format; judged cheaply. Raises
            where the path can only be of this format and is unusable. Formats whose files differ only in the names
            inside them share one function, which is called once for all of them.
        find: what ``read`` needs; raises where it is not there.
        read: reads headers and returns the :class:`Source`.
        claims: whether what ``locate`` found is of this format and not of another that shares the function.
        accepts: names of the options that it reads, besides those in :data:`ALWAYS`.
    """

    name: str
    title: str
    locate: Callable[[str, Options], Located | None]
    find: Callable[[str, Options], Located]
    read: Callable[[Located, Options], Source]
    claims: Callable[[Located], bool] = lambda located: True
    accepts: frozenset[str] = frozenset()

    def open(self, path: str, options: Options) -> Source:
        """The checkpoint at ``path``, headers read.

        Raises:
            UsageError: options that this format does not read; all are named.
            GptConvertError: as ``find`` and ``read``.
        """
        self.check_options(path, options)
        return self.read(self.find(path, options), options)

    def check_options(self, path: str, options: Options) -> None:
        """Refuse options that this format does not read.

        Raises:
            UsageError: there are some; all are named.
        """
        ignored = [i.flag for n, i in options.given("source", "checkpoint").items() if n not in self.accepts | ALWAYS]
        if ignored:
            verb = "does" if len(ignored) == 1 else "do"
            raise UsageError(f"{', '.join(ignored)} {verb} not apply to {self.title} files", path=path)


def path_format(
    name: str,
    title: str,
    recognises: Callable[[str], bool],
    read: Callable[[str, Options], Source],
    accepts: frozenset[str] = frozenset(),
) -> Format[str]:
    """A format that is recognised by file names and first bytes, and whose ``read`` takes the path itself."""

    def locate(path: str, options: Options) -> str | None:
        return path if recognises(path) else None

    def find(path: str, options: Options) -> str:
        return path

    return Format(name, title, locate, find, read, accepts=accepts)
