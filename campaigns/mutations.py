"""Damage to a copy of a checkpoint: bytes, numbers, values of JSON, members of archives, rows of indexes, files.

Damage below a checksum is repaired around: a member of a zip archive and a row of a TensorFlow index get a new
checksum, so that the parsers behind it see the damage too.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptconvert.containers.leveldb import read_table, write_table
from gptconvert.containers.protobuf import MalformedError

#: Numbers at the limits of parsers, allocators and loops.
NUMBERS: tuple[object, ...] = (
    *(0, 1, -1, 2, 3, 127, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30),
    *(10**299, 10**400, -(2**63), 0.0, -0.0, 0.5, 1e-5, 1e30, 1e308, -1e308, 1.7976931348623157e308),
)
#: Values of the wrong kind.
VALUES: tuple[object, ...] = (
    *(None, True, False, "", "a", "\0", "../x", "/etc/passwd", "é", "\U0010ffff", "a" * 5000, "1e5", "0x10"),
    *([], {}, [[]], [None], {"": None}, [1, 2, 3], [1] * 500, {"a": {"b": []}}, [["global", "local"], 10**9]),
    *([[["global"], 10**9]], [[[], 10**9]], [[["local"], -1]], [[["global", "local"], True]]),
)
_PACKED = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f")

Mutation = Callable[[random.Random, bytes], bytes]


def damaged(dice: random.Random, data: bytes) -> bytes:
    """``data`` with one to three places changed."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        data = dice.choice(_BYTE_MUTATIONS)(dice, data)
    return data


def _flip(dice: random.Random, data: bytes) -> bytes:
    at = _place(dice, data)
    return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :] if data else b"\1"


def _overwrite(dice: random.Random, data: bytes) -> bytes:
    at, new = _place(dice, data), dice.choice(_PACKED)
    return data[:at] + new + data[at + len(new) :]


def _number(dice: random.Random, data: bytes) -> bytes:
    at, size = _place(dice, data), dice.choice((1, 2, 4, 8))
    limit = 1 << 8 * size
    value = dice.choice((0, 1, limit - 1, limit // 2, limit // 2 - 1, len(data), dice.randrange(limit))) % limit
    return data[:at] + value.to_bytes(size, dice.choice(("little", "big"))) + data[at + size :]


def _remove(dice: random.Random, data: bytes) -> bytes:
    at = _place(dice, data)
    return data[:at] + data[at + dice.choice((1, 1, 2, 4, 8, 64, 4096)) :]


def _insert(dice: random.Random, data: bytes) -> bytes:
    at = _place(dice, data)
    return data[:at] + dice.randbytes(dice.choice((1, 1, 2, 4, 8))) + data[at:]


def _repeat(dice: random.Random, data: bytes) -> bytes:
    at, size = _place(dice, data), dice.choice((1, 2, 4, 16, 64, 512))
    return data[:at] + data[at : at + size] * dice.choice((2, 3, 50, 2000)) + data[at + size :]


def _truncate(dice: random.Random, data: bytes) -> bytes:
    return data[: _place(dice, data)]


def _splice(dice: random.Random, data: bytes) -> bytes:
    at, source, size = _place(dice, data), _place(dice, data), dice.choice((2, 8, 32, 256))
    return data[:at] + data[source : source + size] + data[at + size :]


def _text_number(dice: random.Random, data: bytes) -> bytes:
    """A decimal number in text replaced by one at a limit."""
    places = [at for at in range(min(len(data), 4096)) if data[at : at + 1].isdigit()]
    if not places:
        return _flip(dice, data)
    at = dice.choice(places)
    end = at
    while end < len(data) and data[end : end + 1].isdigit():
        end += 1
    return data[:at] + str(dice.choice(NUMBERS)).encode() + data[end:]


def _place(dice: random.Random, data: bytes) -> int:
    """A position: anywhere, or in the first or last bytes, where headers are."""
    size = max(1, len(data))
    near = min(size, dice.choice((16, 64, 512, 4096)))
    return dice.choice((dice.randrange(size), dice.randrange(near), size - 1 - dice.randrange(near)))


_BYTE_MUTATIONS: tuple[Mutation, ...] = (
    *(_flip, _overwrite, _number, _remove, _insert, _repeat, _truncate, _splice, _text_number),
)


def json_value(dice: random.Random, data: bytes) -> bytes:
    """JSON with one value replaced, moved, removed or nested."""
    try:
        value = json.loads(data)
    except ValueError:
        return damaged(dice, data)
    for _ in range(dice.choice((1, 1, 2))):
        value = _changed(dice, value)
    try:
        return json.dumps(value, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return damaged(dice, data)


def _changed(dice: random.Random, value: Any) -> Any:
    inside = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    if not inside or dice.random() < 0.03:
        return _hostile(dice, value)
    key, action = dice.choice(list(inside)), dice.random()
    if isinstance(value[key], (dict, list)) and value[key] and action < 0.8:
        changed = _changed(dice, value[key])
        return {**value, key: changed} if isinstance(value, dict) else [*value[:key], changed, *value[key + 1 :]]
    if isinstance(value, list):
        return value[:key] + ([] if action < 0.2 else [_hostile(dice, value[key])]) + value[key + 1 :]
    rest = {k: v for k, v in value.items() if k != key}
    if action < 0.1:
        return rest
    if action < 0.15:
        return {**rest, dice.choice(("", "x", key + "x", "__metadata__", key.upper())): value[key]}
    return {**value, key: _hostile(dice, value[key])}


def _hostile(dice: random.Random, value: Any) -> Any:
    action = dice.random()
    if action < 0.45:
        return dice.choice(NUMBERS)
    if action < 0.85:
        return dice.choice(VALUES)
    if isinstance(value, int) and not isinstance(value, bool):
        return value + dice.choice((-1, 1)) if action < 0.95 else str(value)
    deep: Any = value
    for _ in range(dice.choice((1, 30, 126, 200))):
        deep = [deep]
    return deep


def safetensors_header(dice: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header has a changed value, and the right length."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 0 < size < len(data):
        return damaged(dice, data)
    change = json_value if dice.random() < 0.7 else damaged
    header = change(dice, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def zip_member(dice: random.Random, data: bytes, among: str = "") -> bytes:
    """A zip archive with one damaged member, whose path matches ``among``, and the checksum of the damaged bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # damaged twice
        return damaged(dice, data)
    eligible = [name for name in members if re.search(among, name)]
    small = [name for name in eligible if len(members[name]) < 1 << 16] or eligible
    pickles = [name for name in small if name.endswith(".pkl")]
    if not small:
        return damaged(dice, data)
    chosen = dice.choice(pickles if pickles and dice.random() < 0.8 else small)
    members[chosen] = damaged(dice, members[chosen])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # with a fixed date
    return out.getvalue()


def index_row(dice: random.Random, data: bytes) -> bytes:
    """A TensorFlow index with one damaged row, and the checksums of the damaged blocks."""
    try:
        rows = list(read_table(data))
    except MalformedError:
        return damaged(dice, data)
    at = dice.randrange(len(rows))
    key, value = rows[at]
    rows[at] = (damaged(dice, key), value) if dice.random() < 0.2 else (key, damaged(dice, value))
    return write_table(sorted(dict(rows).items()))


#: Ending of a file's name → mutation that knows its structure.
STRUCTURED: Mapping[str, Mutation] = {
    ".json": json_value,
    ".safetensors": safetensors_header,
    ".bin": zip_member,
    ".pt": zip_member,
    ".npz": zip_member,
    ".index": index_row,
}


def mutate(dice: random.Random, folder: Path) -> str:
    """Damage a checkpoint in ``folder``; returns a description."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return "nothing left"
    path = dice.choice(files)
    name = path.relative_to(folder)
    if dice.random() < 0.04:
        what = dice.choice(list(_FILE_MUTATIONS))
        _FILE_MUTATIONS[what](dice, path, files)
        return f"{name}: {what}"
    structured = STRUCTURED.get(path.suffix)
    change = structured if structured is not None and dice.random() < 0.7 else damaged
    path.write_bytes(change(dice, path.read_bytes()))
    return f"{name}: {change.__name__}"


def _replaced(make: Callable[[Path], object]) -> Callable[[random.Random, Path, list[Path]], None]:
    def change(dice: random.Random, path: Path, files: list[Path]) -> None:
        path.unlink()
        make(path)

    return change


_FILE_MUTATIONS: Mapping[str, Callable[[random.Random, Path, list[Path]], None]] = {
    "removed": _replaced(lambda path: None),
    "empty": _replaced(lambda path: path.write_bytes(b"")),
    "a directory": _replaced(lambda path: path.mkdir()),
    "a named pipe": _replaced(lambda path: os.mkfifo(path)),
    "a link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "a link to /dev/zero": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a dangling link": _replaced(lambda path: path.symlink_to("nowhere")),
    "newlines": _replaced(lambda path: path.write_bytes(b"\n" * 100_000)),
    "zeros": lambda dice, path, files: path.write_bytes(bytes(path.stat().st_size)) and None,
    "another file's content": lambda dice, path, files: path.write_bytes(dice.choice(files).read_bytes()) and None,
}
