"""Byte ranges of the members of uncompressed zip archives, the container of ``torch.save`` and ``numpy.savez``.

Only the central directory and the members' local headers are read. Compressed members are refused: weights are
normally stored uncompressed, compressed bytes cannot be copied raw, and a small file could expand to terabytes.
Format: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from gptconvert.containers.untrusted import file_size
from gptconvert.errors import FETCH_AGAIN, InputError, UnsafeInputError
from gptconvert.model.tensors import Segment

#: Maximum size of a central directory in bytes; a member takes about 100.
MAX_DIRECTORY = 64 << 20
#: Maximum number of members. Each is located with a read of its own; a file of 100 000 tensors has as many.
MAX_MEMBERS = 100_000

_END = struct.Struct("<4s4H2LH")  # disks ×2, entries ×2, directory size and offset, comment length
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
#: Flags of members: encrypted, strongly encrypted, or with a masked local header; a patch; a name in UTF-8.
_ENCRYPTED, _PATCH, _UTF8 = 1 << 0 | 1 << 6 | 1 << 13, 1 << 5, 1 << 11
_IN_ZIP64 = 0xFFFFFFFF
#: Newest version of the format that a member may need, times ten.
_MAX_VERSION = 63


@dataclass(frozen=True, slots=True)
class Member:
    """One uncompressed member: its name, its byte range, and the CRC-32 of its bytes."""

    name: str
    data: Segment
    crc32: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One central directory entry."""

    name: str
    flags: int
    method: int
    crc32: int
    packed: int
    nbytes: int
    header: int


def read_members(path: str | os.PathLike[str]) -> dict[str, Member]:
    """The archive's members by name, in the order of its central directory.

    Raises:
        InputError: the central directory is missing (the file is truncated) or damaged.
        UnsafeInputError: compressed or encrypted members, duplicate names, names that leave the archive, or
            overlapping members.
    """
    path = os.fspath(path)
    size = file_size(path)
    try:
        with open(path, "rb") as file:
            entries = _read_directory(file, size, path)
            _check_entries(entries, path)
            members = [_locate(file, entry, size, path) for entry in entries]
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    _check_overlap(members, path)
    return {member.name: member for member in members}


def _read_directory(file: BinaryIO, size: int, path: str) -> list[_Entry]:
    count, nbytes, offset = _find_directory(file, size, path)
    if offset + nbytes > size:
        raise _damaged(path, f"central directory at bytes {offset}–{offset + nbytes} of {size}")
    if nbytes > MAX_DIRECTORY:
        expected, found = f"at most {MAX_DIRECTORY} bytes", f"{nbytes} bytes"
        raise UnsafeInputError("zip central directory is too long", path=path, expected=expected, found=found)
    if count > MAX_MEMBERS:
        raise UnsafeInputError(
            "zip archive has too many members", path=path, expected=f"at most {MAX_MEMBERS}", found=count
        )
    file.seek(offset)
    data = file.read(nbytes)
    entries, position = list[_Entry](), 0
    while position < len(data) and len(entries) <= count:
        entry, position = _parse_entry(data, position, path)
        entries.append(entry)
    if len(entries) != count:
        raise _damaged(
            path,
            f"central directory declares {count} members but lists "
            f"{'more' if len(entries) > count else len(entries)}",
        )
    return entries


def _find_directory(file: BinaryIO, size: int, path: str) -> tuple[int, int, int]:
    """Number of entries, size and offset of the central directory."""
    start = max(0, size - _END.size - _MAX_COMMENT)
    file.seek(start)
    tail = file.read(size - start)
    at = tail.rfind(b"PK\5\6")
    while at >= 0:
        # A comment may contain the signature: only the real record's comment ends at the end of the file.
        if at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[7] == len(tail):
            break
        at = tail.rfind(b"PK\5\6", 0, at)
    if at < 0:
        raise InputError(
            "file is truncated: the zip central directory at its end is missing",
            path=path,
            found=f"{size} bytes",
            hint=FETCH_AGAIN,
        )
    _, disk, first, here, *narrow, _ = _END.unpack_from(tail, at)
    if (disk, first, here) not in ((0, 0, narrow[0]), (0xFFFF, 0xFFFF, 0xFFFF)):
        raise _damaged(path, "an archive of several disks")
    found, end = _find_directory64(file, narrow, start + at, path)
    if found[1] + found[2] != end:  # readers differ in which of the two places they believe
        raise _damaged(path, f"central directory ends at byte {found[1] + found[2]}, its end record is at {end}")
    return found


def _find_directory64(file: BinaryIO, narrow: list[int], end: int, path: str) -> tuple[tuple[int, int, int], int]:
    """Number of entries, size and offset of the directory, and where it must end.

    Like other readers, use the zip64 record if there is one; the fields ``narrow`` of the plain record, at ``end``,
    must agree with it or refer to it.
    """
    locator = end - _END64_LOCATOR.size
    file.seek(max(0, locator))
    data = file.read(_END64_LOCATOR.size)
    if locator < 0 or data[:4] != b"PK\6\7":
        count, nbytes, offset = narrow
        if count == 0xFFFF or _IN_ZIP64 in (nbytes, offset):
            raise _damaged(path, "zip64 end record is missing")
        return (count, nbytes, offset), end
    _, disk, record, disks = _END64_LOCATOR.unpack(data)
    if (disk, disks) != (0, 1):
        raise _damaged(path, "an archive of several disks")
    if record + _END64.size != locator:
        raise _damaged(path, f"zip64 end record at byte {record}, its locator at {locator}")
    file.seek(record)
    fields = _END64.unpack(file.read(_END64.size))
    if fields[0] != b"PK\6\6":
        raise _damaged(path, "zip64 end record is missing")
    if fields[4:6] != (0, 0) or fields[6] != fields[7]:
        raise _damaged(path, "an archive of several disks")
    wide = (fields[7], fields[8], fields[9])
    if any(
        value not in (true, mark)
        for value, true, mark in zip(narrow, wide, (0xFFFF, _IN_ZIP64, _IN_ZIP64), strict=True)
    ):
        raise _damaged(path, "the two end records disagree")
    return wide, record


def _parse_entry(data: bytes, position: int, path: str) -> tuple[_Entry, int]:
    """The entry at ``position`` of the central directory, and the position of the next."""
    if position + _ENTRY.size > len(data) or data[position : position + 4] != b"PK\1\2":
        raise _damaged(path, f"no central directory entry at byte {position} of the directory")
    fields = _ENTRY.unpack_from(data, position)
    flags, method, crc32, packed, nbytes = fields[3], fields[4], *fields[7:10]
    name_bytes, extra_bytes, comment_bytes, header = fields[10], fields[11], fields[12], fields[16]
    name_at = position + _ENTRY.size
    extra_at = name_at + name_bytes
    end = extra_at + extra_bytes + comment_bytes
    if end > len(data):
        raise _damaged(path, "truncated central directory")
    wide = _zip64_fields(data[extra_at : extra_at + extra_bytes])
    nbytes, packed, header = (
        (wide.pop(0) if value == _IN_ZIP64 and wide else value) for value in (nbytes, packed, header)
    )
    if fields[2] & 0xFF > _MAX_VERSION or fields[13]:
        raise _damaged(path, f"an entry of format version {(fields[2] & 0xFF) / 10} on disk {fields[13]}")
    name = data[name_at:extra_at].decode("utf-8" if flags & _UTF8 else "cp437", "replace")
    return _Entry(name, flags, method, crc32, packed, nbytes, header), end


def _zip64_fields(extra: bytes) -> list[int]:
    """The 64-bit sizes and offset that did not fit in an entry, in the order of its fields."""
    position = 0
    while position + 4 <= len(extra):
        tag, nbytes = struct.unpack_from("<2H", extra, position)
        if tag == 1:
            whole = extra[position + 4 : position + 4 + nbytes // 8 * 8]
            return list(struct.unpack(f"<{len(whole) // 8}Q", whole[: len(whole) // 8 * 8]))
        position += 4 + nbytes
    return []


def _check_entries(entries: Sequence[_Entry], path: str) -> None:
    rules: Mapping[str, list[str]] = {
        "compressed members": [e.name for e in entries if e.method != 0],
        "encrypted members": [e.name for e in entries if e.flags & _ENCRYPTED],
        "patches of members": [e.name for e in entries if e.flags & _PATCH],
        "duplicate member names": [n for n, c in Counter(e.name for e in entries).items() if c > 1],
        "member names that leave the archive": [e.name for e in entries if _leaves(e.name)],
        "members whose compressed and uncompressed sizes differ": [
            e.name for e in entries if e.method == 0 and e.packed != e.nbytes
        ],
    }
    broken = [f"{what}: {', '.join(names[:5])}" for what, names in rules.items() if names]
    if broken:
        raise UnsafeInputError(
            f"zip archive refused: {'; '.join(broken)}",
            path=path,
            expected="uncompressed members, as torch.save and numpy.savez write them",
        )


def _leaves(name: str) -> bool:
    """Whether extracting ``name`` could write outside the directory."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or parts[0] == "" or parts[0].endswith(":") or "\0" in name


def _locate(file: BinaryIO, entry: _Entry, size: int, path: str) -> Member:
    """The member's byte range. It follows a local header, whose length is recorded only in that header."""
    file.seek(entry.header)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise _damaged(path, f"no local header for {entry.name} at byte {entry.header}")
    flags, (name_bytes, extra_bytes) = _LOCAL.unpack(header)[2], _LOCAL.unpack(header)[9:]
    start = entry.header + _LOCAL.size + name_bytes + extra_bytes
    if file.read(name_bytes) != entry.name.encode("utf-8" if flags & _UTF8 else "cp437", "replace"):
        raise _damaged(path, f"local header at byte {entry.header} is not that of {entry.name}")
    if start + entry.nbytes > size:
        raise InputError(
            f"file is truncated inside member {entry.name}",
            path=path,
            expected=f"{start + entry.nbytes} bytes",
            found=f"{size} bytes",
        )
    return Member(entry.name, Segment(path, start, entry.nbytes), entry.crc32)


def _check_overlap(members: Sequence[Member], path: str) -> None:
    filled = sorted((m for m in members if m.data.nbytes), key=lambda m: m.data.offset)
    for before, after in pairwise(filled):
        if before.data.end > after.data.offset:
            raise UnsafeInputError(f"zip members {before.name} and {after.name} overlap", path=path)


def _damaged(path: str, found: str) -> InputError:
    return InputError("zip archive is damaged", path=path, found=found)
