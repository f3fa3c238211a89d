"""A checkpoint format: how to recognise and open it, and which options it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from gptconvert.errors import UsageError
from gptconvert.model.options import Options
from gptconvert.model.source import Source

#: Options that apply to every format.
ALWAYS = frozenset({"cache_dir", "offline", "task", "trim_vocab"})
#: Options of formats that have a configuration and name their tensors.
EDITS = frozenset({"ignore_key", "ignore_tensor", "set_key"})

#: What ``locate`` and ``find`` return and ``read`` takes.
Located = TypeVar("Located")


@dataclass(frozen=True)
class Format(Generic[Located]):
    """One checkpoint format.

    A path is located once: by ``locate`` during detection, or by ``find`` if the user named the format. The work done
    for it (an index read, a pickle parsed) is passed to ``read``.

    Attributes:
        name: the naming scheme (``openai-tf``, ``hf``), and the command unless ``shares_command`` names another.
        title: name shown to users.
        locate: cheap check; returns the input of ``read``, or None if the path does not look like this format.
            Raises if the path can only be this format but is unusable. Formats whose files differ only in the names
            inside them share one function, which is called once for all of them.
        find: returns the input of ``read``; raises if the path is not such a checkpoint.
        read: reads headers and returns the :class:`Source`.
        claims: whether the result of ``locate`` belongs to this format rather than to another that shares ``locate``.
        accepts: names of the options that it reads, besides those in :data:`ALWAYS`.
        shares_command: command of another format that also opens this one.
    """

    name: str
    title: str
    locate: Callable[[str, Options], Located | None]
    find: Callable[[str, Options], Located]
    read: Callable[[Located, Options], Source]
    claims: Callable[[Located], bool] = lambda located: True
    accepts: frozenset[str] = frozenset()
    shares_command: str | None = None

    @property
    def command(self) -> str:
        """The command that opens the format."""
        return self.shares_command or self.name

    def open(self, path: str, options: Options) -> Source:
        """Open the checkpoint at ``path``, reading only headers.

        Raises:
            UsageError: options that this format does not read; the message lists them all.
            GptConvertError: as ``find`` and ``read``.
        """
        self.check_options(path, options)
        return self.read(self.find(path, options), options)

    def check_options(self, path: str, options: Options) -> None:
        """Refuse options that this format does not read.

        Raises:
            UsageError: at least one was given; the message lists them all.
        """
        ignored = [i.flag for n, i in options.given("source", "checkpoint").items() if n not in self.accepts | ALWAYS]
        if ignored:
            listed, verb = ", ".join(ignored), "does" if len(ignored) == 1 else "do"
            raise UsageError(
                f"{listed} {verb} not apply to {self.title} files", path=path, hint=f"run again without {listed}"
            )


def path_format(
    name: str,
    title: str,
    recognises: Callable[[str], bool],
    read: Callable[[str, Options], Source],
    accepts: frozenset[str] = frozenset(),
    shares_command: str | None = None,
) -> Format[str]:
    """A format recognised by file names and first bytes, whose ``read`` takes the path itself."""

    def locate(path: str, options: Options) -> str | None:
        return path if recognises(path) else None

    def find(path: str, options: Options) -> str:
        return path

    return Format(name, title, locate, find, read, accepts=accepts, shares_command=shares_command)
