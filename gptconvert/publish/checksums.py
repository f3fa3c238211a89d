"""``SHA256SUMS`` in the format of ``sha256sum``: reading, writing, and the digest of a file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import IO, NamedTuple

from gptconvert.containers.untrusted import is_plain_name

#: Largest ``SHA256SUMS`` that is read, in bytes.
MAX_SUMS = 16 << 20
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_BLOCK = 1 << 20


class Sums(NamedTuple):
    """The content of a ``SHA256SUMS``.

    Attributes:
        digests: relative path → SHA-256.
        unreadable: lines that are malformed, or name a file outside the directory.
    """

    digests: dict[str, str]
    unreadable: list[str]


def parse_sums(data: bytes) -> Sums:
    """Parse a ``SHA256SUMS``. A path that is listed twice with two digests is malformed."""
    sums = Sums({}, [])
    text = data.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    for line in filter(None, text.split("\n")):
        match = _LINE.fullmatch(line)
        plain = match is not None and all(map(is_plain_name, match[2].split("/")))
        if match is None or not plain or sums.digests.setdefault(match[2], match[1]) != match[1]:
            sums.unreadable.append(line)
    return sums


def dump_sums(digests: Mapping[str, str]) -> bytes:
    """Write a ``SHA256SUMS``, by path."""
    lines = (f"{digest}  {path}\n" for path, digest in sorted(digests.items()))
    return "".join(lines).encode("utf-8", "surrogateescape")


def sha256_of_file(file: IO[bytes]) -> str:
    """SHA-256 of the rest of an open file."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
