"""Safe access to files and directories that may be hostile.

Readers call :func:`file_size` (or :func:`read_small`) before they open a file, so that a FIFO or device can neither
block nor be read forever; :func:`explain_file` after parsing fails, so that the message is "Git LFS pointer" rather
than "bad magic number"; and :func:`file_beside` or :func:`links_out` for every file that another file names, so that
a checkpoint cannot cause unrelated files to be read.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from gptconvert.errors import UNFINISHED, GptConvertError, InputError, UnforeseenError, UnsafeInputError

_HEAD_BYTES = 512
_TAR_MAGIC_AT = 257
#: Length of the JSON header that begins a safetensors file, at most.
_MAX_HEADER = 100_000_000

#: ``stat`` predicate → name of a file type other than a regular file.
_SPECIAL: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)
#: (kind, first bytes, description). The first match wins.
_MAGIC: tuple[tuple[str, bytes, str], ...] = (
    (
        "lfs",
        b"version https://git-lfs.github.com/spec/",
        "is a Git LFS pointer, not the file itself; run `git lfs pull` in the clone",
    ),
    (
        "lfs",
        b"# xet version",
        "is a Xet pointer, not the file itself; download it with `hf download`",
    ),
    ("annex", b"/annex/objects/", "is a git-annex pointer, not the file itself; run `git annex get`"),
    ("gzip", b"\x1f\x8b", "is gzip-compressed; decompress it first"),
    ("bzip2", b"BZh", "is bzip2-compressed; decompress it first"),
    ("xz", b"\xfd7zXZ\x00", "is xz-compressed; decompress it first"),
    ("zstd", b"\x28\xb5\x2f\xfd", "is zstd-compressed; decompress it first"),
    ("7z", b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive; unpack it first"),
    ("zip", b"PK\x03\x04", "is a zip archive (PyTorch's .bin and .pt files are such archives)"),
    ("hdf5", b"\x89HDF\r\n\x1a\n", "is an HDF5 file (possibly Keras weights)"),
    ("npy", b"\x93NUMPY", "is a NumPy array file"),
    ("pickle", b"\x80\x02", "is a Python pickle"),
    ("pickle", b"\x80\x03", "is a Python pickle"),
    ("pickle", b"\x80\x04", "is a Python pickle"),
    ("pickle", b"\x80\x05", "is a Python pickle"),
    ("gguf", b"GGUF", "is a GGUF file (llama.cpp)"),
    ("pdf", b"%PDF-", "is a PDF document"),
    ("image", b"\x89PNG\r\n\x1a\n", "is an image"),
    ("elf", b"\x7fELF", "is a program"),
)
_HTML_STARTS = (b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")


def explain_bytes(head: bytes, allow: Collection[str] = ()) -> str | None:
    """The kind of file that begins with ``head``, worded to follow "this file …"; None if unknown.

    Args:
        head: the first few hundred bytes, fewer only if the file is shorter.
        allow: kinds not to report, because they are expected (``{"zip"}`` for a PyTorch file).
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found: list[tuple[str, str]] = []
    if not head:
        found.append(("empty", f"is empty (0 bytes); {UNFINISHED}"))
    if text.startswith(_HTML_STARTS):
        found.append(("html", "is an HTML page: the download returned a web page instead of the file"))
    if text.startswith((b"<?xml", b"<error")):
        found.append(("xml", "is an XML page: the download returned a server's error message instead of the file"))
    found += [(kind, description) for kind, magic, description in _MAGIC if head.startswith(magic)]
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        found.append(("tar", "is a tar archive; unpack it first"))
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < _MAX_HEADER:
        found.append(("safetensors", "is a safetensors file: rename it, so that its name ends in .safetensors"))
    if len(head) >= 64 and not any(head):
        found.append(("zeros", f"begins with zero bytes only; {UNFINISHED}"))
    if head and not found and _is_text(head):
        start = head[:60].decode("ascii").strip().splitlines() or [""]
        found.append(("text", f"is a text file that begins with {start[0]!r}"))
    return next((description for kind, description in found if kind not in allow), None)


def explain_file(path: str | os.PathLike[str], allow: Collection[str] = ()) -> str | None:
    """:func:`explain_bytes` of the file at ``path``; None also if it is not a regular file or cannot be read."""
    try:
        return explain_bytes(read_head(path), allow)
    except GptConvertError:
        return None


def read_head(path: str | os.PathLike[str]) -> bytes:
    """The first bytes of a regular file.

    Raises:
        UnsafeInputError: it is not a regular file.
        InputError: it is missing or cannot be read.
    """
    file_size(path)
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise InputError(f"cannot be read ({_reason(error)})", path=path) from error


def file_size(path: str | os.PathLike[str]) -> int:
    """Size in bytes of the regular, readable file at ``path``, determined without opening it.

    Raises:
        UnsafeInputError: a directory, named pipe, device or socket.
        InputError: missing, or not readable by this user.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise InputError("file is missing", path=path) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the name
        raise InputError(f"cannot be read ({_reason(error)})", path=path) from error
    if not stat.S_ISREG(status.st_mode):
        found = next((name for test, name in _SPECIAL if test(status.st_mode)), "something else")
        raise UnsafeInputError("not a regular file", path=path, expected="a regular file", found=found)
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise InputError(
            "cannot be read (Permission denied)", path=path, hint="make it readable: chmod u+r, or ask its owner"
        )
    return status.st_size


def entries(folder: str, *, files_only: bool = False, marked: bool = False, quiet: bool = False) -> list[str]:
    """Sorted names in a directory.

    Args:
        folder: the directory.
        files_only: leave out directories, and links to them.
        marked: append ``/`` to the names of directories, and of links to them.
        quiet: return an empty list if it cannot be read.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            listed = [(entry.name, (files_only or marked) and entry.is_dir()) for entry in found]
            return sorted(
                f"{name}/" if marked and is_folder else name
                for name, is_folder in listed
                if not (files_only and is_folder)
            )
    except (OSError, ValueError) as error:
        if quiet:
            return []
        raise InputError(f"directory cannot be read ({_reason(error)})", path=folder) from error


def no_such_path(path: str, *, hub: bool = True) -> InputError:
    """The error for a path that does not exist.

    Args:
        path: the path.
        hub: whether a hub repository could be given instead.
    """
    url = re.match(r"\w+://(?:(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+(?:/[^/?#]+)?))?", path)
    if url is not None:
        hub_hint = f"pass the name of the repository: gptconvert hf {url[1]}" if url[1] else None
        return InputError("a URL, not a path", path=path, hint=hub_hint or "download it, and pass the path")
    hint = similar_path(path) or ("or name a hub repository: org/name" if hub else None)
    return InputError("no such file or directory", path=path, hint=hint)


def similar_path(path: str) -> str | None:
    """A hint with names similar to a missing path's in its deepest existing directory; None if there are none."""
    parent, name = os.path.split(path.rstrip("/"))
    while parent and not os.path.isdir(parent):
        parent, name = os.path.split(parent.rstrip("/"))
    similar = difflib.get_close_matches(name, entries(parent or ".", quiet=True), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(os.path.join(parent, n) for n in similar)}?" if similar else None


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is a file name rather than a path, on any system."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0") and name[1:2] != ":"


def is_regular(path: str) -> bool:
    """Whether ``path`` is a regular file, or a link to one."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def links_out(path: str, homes: Iterable[str]) -> bool:
    """Whether ``path``, with its links resolved, is outside all of ``homes``, which must be resolved already."""
    target = os.path.realpath(path)
    return not any(os.path.commonpath([home, target]) == home for home in homes)


def hub_homes(directory: str) -> list[str]:
    """Where links in ``directory`` may lead: into it and, in a hub cache, into the stores that hold its files.

    A cache's links are ``CACHE/REPO/snapshots/COMMIT/FILE`` → ``CACHE/REPO/blobs/…``, which may itself be a link into
    ``CACHE/blobs/…``, the store that repositories share.
    """
    home = os.path.realpath(directory)
    homes, snapshots = [home], os.path.dirname(home)
    if os.path.basename(snapshots) == "snapshots":
        repo = os.path.dirname(snapshots)
        homes += [os.path.join(repo, "blobs"), os.path.join(os.path.dirname(repo), "blobs")]
    return homes


def file_beside(path: str, location: str, what: str) -> str:
    """The file that the file at ``path`` refers to by ``location``, relative to its directory; links resolved.

    A link may lead elsewhere in that directory, or into the directory that ``path`` itself links into, as in a hub
    cache.

    Args:
        path: the file that refers to another.
        location: the relative path that it contains.
        what: name of such a file in error messages (``external data``).

    Raises:
        UnsafeInputError: it is outside the directory, or not a regular file.
        InputError: it is missing, or cannot be read.
    """
    parts, folder = location.replace("\\", "/").split("/"), os.path.dirname(path)
    if os.path.isabs(location) or "\\" in location or ":" in parts[0] or ".." in parts or "\0" in location:
        raise UnsafeInputError(f"{what} {location!r} leaves the directory", path=path)
    named = os.path.join(folder, location)
    try:
        file_size(named)
    except GptConvertError as error:
        raise type(error)(f"{what} {location!r}: {error.message}", path=path) from error
    if links_out(named, (os.path.realpath(folder or "."), os.path.dirname(os.path.realpath(path)))):
        raise UnsafeInputError(f"{what} {location!r} links out of the directory", path=path)
    return os.path.realpath(named)


def read_small(path: str | os.PathLike[str], limit: int, what: str) -> bytes:
    """The contents of a small file.

    Args:
        path: the file.
        limit: maximum size in bytes.
        what: its name in error messages (``hparams.json``).

    Raises:
        UnsafeInputError: not a regular file.
        InputError: missing, unreadable, or larger than ``limit``.
    """
    size = file_size(path)
    if size > limit:
        raise InputError(f"too large for {what}", path=path, expected=f"at most {limit} bytes", found=f"{size} bytes")
    try:
        with open(path, "rb") as file:
            return file.read(limit + 1)[:limit]
    except OSError as error:
        raise InputError(f"cannot be read ({_reason(error)})", path=path) from error


@contextmanager
def boundary(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """The boundary of all code that reads a checkpoint: no exception of the block but our own passes it.

    A damaged file can make any line of a reader, and of the libraries that it uses, fail. Such a failure is the
    file's, not the conversion's.

    Args:
        path: what is read.
        what: its format (``Hugging Face, PyTorch``).

    Raises:
        UnforeseenError: instead of an exception of another class, which is its cause. Interrupts and missing packages
            are raised unchanged.
    """
    try:
        yield
    except (GptConvertError, KeyboardInterrupt, SystemExit, GeneratorExit, ImportError):
        raise
    except BaseException as error:  # not Exception: panics of Rust libraries have a class of their own
        reason = "not enough memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"[:300]
        raise UnforeseenError(
            f"cannot be read as {what} ({reason})",
            path=path,
            hint="the file is probably damaged: fetch it again. If other programs read it, report this with the "
            "traceback that --debug shows",
        ) from error


def _is_text(head: bytes) -> bool:
    return all(byte in b"\t\r\n" or 0x20 <= byte < 0x7F for byte in head)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
