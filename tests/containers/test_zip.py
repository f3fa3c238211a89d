"""Uncompressed zip archives are read; malicious and damaged ones are refused."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import pytest

from gptconvert.containers.torch import read_torch
from gptconvert.containers.zip import read_members
from gptconvert.errors import InputError, UnsafeInputError
from tests.containers.torch_files import rewrite, save


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A state dict of two tensors."""
    import torch

    return save(tmp_path / "small.bin", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)})


def test_25_compressed_members(small: str, tmp_path: Path) -> None:
    path = rewrite(small, tmp_path / "x.bin", lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeInputError, match="compressed members"):
        read_torch(path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "small/../../x", "C:/x", "a\\..\\b"])
def test_26_member_names_that_leave_the_archive(small: str, name: str) -> None:
    with zipfile.ZipFile(small, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(UnsafeInputError, match="leave the archive"):
        read_torch(small)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_26_member_twice(small: str) -> None:
    with zipfile.ZipFile(small, "a") as archive:
        archive.writestr("small/data/0", bytes(24))
    with pytest.raises(UnsafeInputError, match="duplicate member names: small/data/0"):
        read_torch(small)


def test_overlapping_members(small: str) -> None:
    """A member whose local header is inside another member: both names would read the same bytes."""
    content = Path(small).read_bytes()
    inner = zipfile.ZipInfo("small/data/9")
    with zipfile.ZipFile(small, "a") as archive:
        inner.CRC = zlib.crc32(b"inside")
        archive.writestr("small/outer", inner.FileHeader() + b"inside")
        outer = archive.getinfo("small/outer")
        inside = outer.header_offset + 30 + len(outer.filename)
        inner.file_size = inner.compress_size = 6
        inner.header_offset = inside
        archive.filelist.append(inner)
        archive.NameToInfo[inner.filename] = inner
    assert Path(small).read_bytes()[:100] == content[:100]
    with pytest.raises(UnsafeInputError, match="small/outer and small/data/9 overlap"):
        read_torch(small)


def test_zip64(tmp_path: Path) -> None:
    """A storage at an offset beyond 4 GiB, in a sparse file."""
    import torch

    path = tmp_path / "big.bin"
    small = save(tmp_path / "small.bin", {"a": torch.arange(6.0)})
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.truncate(5 << 30)
    with zipfile.ZipFile(small) as old, zipfile.ZipFile(path, "a") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert path.stat().st_blocks * 512 < 1 << 20
    tensors = read_torch(path)
    assert tensors["a"].read().tolist() == [0, 1, 2, 3, 4, 5]
    (part,) = tensors["a"].segments() or ()
    assert part.offset > 5 << 30


def test_comment_that_looks_like_the_end(small: str) -> None:
    with zipfile.ZipFile(small, "a") as archive:
        archive.comment = b"x" + b"PK\5\6" * 9 + bytes(30)
    assert read_torch(small)["a"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("bit", "what"), [(0, "encrypted"), (6, "encrypted"), (13, "encrypted"), (5, "patches of")])
def test_members_that_are_not_stored_as_they_are(small: str, bit: int, what: str) -> None:
    content = bytearray(Path(small).read_bytes())
    content[content.index(b"PK\1\2") + 8 + bit // 8] |= 1 << bit % 8
    Path(small).write_bytes(content)
    with pytest.raises(UnsafeInputError, match=rf"{what} members: small/data\.pkl"):
        read_torch(small)


@pytest.mark.parametrize("name", ["small/version", "small/.data/serialization_id"])
def test_damage_in_a_record_without_tensors(small: str, name: str) -> None:
    with zipfile.ZipFile(small) as archive:
        damaged = archive.read(name)
    content = Path(small).read_bytes()
    assert content.count(damaged) > 0
    at = content.index(damaged, content.index(name.encode()) + len(name))
    Path(small).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(InputError, match=rf"checksum mismatch in {name}"):
        read_torch(small)


@pytest.mark.parametrize("at", [6, 8, 10, 16, 20, 24, 28, 30, 34, 42])
def test_damaged_directory_entry(small: str, at: int) -> None:
    """Damage each relevant field of an entry: version, flags, method, CRC, sizes, lengths, disk and offset."""
    content = bytearray(Path(small).read_bytes())
    content[content.index(b"PK\1\2") + at] ^= 0x47
    Path(small).write_bytes(content)
    with pytest.raises((InputError, UnsafeInputError)):
        read_torch(small)


def archive_of(*, gap: bytes = b"", locator: bool = False, wide_count: int = 1) -> bytes:
    """A member, its directory, and end records: with bytes before them, or with a zip64 record."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a"), b"12345")
    data, end = out.getvalue()[:-22], out.getvalue()[-22:]
    nbytes, offset = struct.unpack_from("<2I", end, 12)
    if locator:
        record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, wide_count, wide_count, nbytes, offset)
        gap = record + struct.pack("<4sIQI", b"PK\6\7", 0, len(data), 1)
    return data + gap + end


def test_the_directory_must_end_where_its_end_record_begins(tmp_path: Path) -> None:
    """Other readers trust the record's place, and then read the members elsewhere or not at all."""
    path = tmp_path / "a.zip"
    path.write_bytes(archive_of())
    assert list(read_members(path)) == ["a"]
    path.write_bytes(archive_of(gap=bytes(7)))
    with pytest.raises(InputError, match="ends at byte 83, its end record is at 90"):
        read_members(path)


def test_two_end_records_must_agree(tmp_path: Path) -> None:
    """Other readers use the zip64 record whenever there is one."""
    path = tmp_path / "a.zip"
    path.write_bytes(archive_of(locator=True))
    assert list(read_members(path)) == ["a"]
    path.write_bytes(archive_of(locator=True, wide_count=2))
    with pytest.raises(InputError, match="the two end records disagree"):
        read_members(path)


@pytest.mark.parametrize("at", [4, 6, 8])
def test_several_disks(tmp_path: Path, at: int) -> None:
    """torch.load refuses such archives too."""
    data = bytearray(archive_of())
    data[-22 + at] ^= 1
    path = tmp_path / "a.zip"
    path.write_bytes(data)
    with pytest.raises(InputError, match="several disks"):
        read_members(path)


@pytest.mark.parametrize("at", [4, 16, 17])
def test_several_disks_of_a_wide_archive(tmp_path: Path, at: int) -> None:
    """The locator's number of the disk, and of all disks."""
    data = bytearray(archive_of(locator=True))
    data[data.index(b"PK\6\7") + at] ^= 1
    path = tmp_path / "a.zip"
    path.write_bytes(data)
    with pytest.raises(InputError, match="several disks"):
        read_members(path)


def test_the_encoding_of_a_name_is_the_local_headers_too(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("é"), b"12345")
    data = bytearray(path.read_bytes())
    assert list(read_members(path)) == ["é"]
    data[7] ^= 8  # of the local header's flags
    path.write_bytes(data)
    with pytest.raises(InputError, match="is not that of é"):
        read_members(path)
