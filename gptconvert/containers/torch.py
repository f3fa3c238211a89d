"""PyTorch checkpoints (``torch.save``), read lazily and without PyTorch: no code runs, no storage is loaded.

A file is a zip archive: ``data.pkl`` describes the object, and member ``data/KEY`` holds the bytes of storage KEY.
Before PyTorch 1.6, a file was a sequence of pickles followed by the storages; that layout is read just as lazily.
Formats: ``torch/serialization.py`` (``_save``, ``_legacy_save``) in PyTorch's sources.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO

from gptconvert.containers.pickle import MAX_BYTES, RESAVE, Opaque, describe, load_pickle
from gptconvert.containers.torch_objects import ByteOrder, torch_rules
from gptconvert.containers.untrusted import explain_file, file_size, read_head
from gptconvert.containers.zip import Member, read_members
from gptconvert.errors import FETCH_AGAIN, GptConvertError, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.tensors import FileChecksum, LazyTensor, Segment, Stored, TensorSet, Transposed, map_segment

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_RESAVE_SCRIPT = RESAVE.replace("model.state", "torch.jit.load(FILE, 'cpu').state")
#: Usual file name extensions.
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
#: Members that hold no part of a tensor.
RECORDS = frozenset({"version", ".data/serialization_id", ".format_version", ".storage_alignment"})
#: Keys under which training scripts save the model's state dict beside their own state.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "state")


@dataclass(frozen=True)
class TorchFile:
    """The contents of one file written by ``torch.save``.

    Attributes:
        path: the file.
        tree: dictionaries, lists, tuples, numbers, strings, None, :class:`Opaque`, and lazy tensors as leaves.
        checksums: recorded checksums of the storages of all tensors.
        notes: what the user should know.
    """

    path: str
    tree: object
    checksums: tuple[FileChecksum, ...] = ()
    notes: tuple[str, ...] = ()


def read_torch(path: str | os.PathLike[str]) -> TensorSet:
    """The state dict in a PyTorch file. A wrapper (``{"state_dict": …}``) is removed, and noted.

    Raises:
        InputError: the file is damaged, not PyTorch's, or contains no named tensors.
        UnsafeInputError: it refers to anything but tensors and plain data, or its zip archive is unsafe.
        UnsupportedError: an element type that numpy lacks.
    """
    path = os.fspath(path)
    file = read_torch_pickle(path)
    state, notes = _unwrap(file.tree, os.path.basename(path))
    found = tensors_of(file, state, path)
    return replace(found, notes=(*file.notes, *notes, *found.notes[len(file.notes) :]))


def tensors_of(file: TorchFile, state: Mapping[object, object], path: str) -> TensorSet:
    """The tensors of one state dict in a file. The rest of the file, such as optimizer state, is never read.

    Raises:
        InputError: the state dict contains no tensors.
    """
    tensors: dict[str, LazyTensor] = {}
    others: list[str] = []
    for name, value in state.items():
        if isinstance(value, LazyTensor) and isinstance(name, str):
            tensors[name] = value
        else:
            others.append(f"{name} ({_kind(value)})")
    if not tensors:
        found = f"{_kind(file.tree)} of {', '.join(others[:5]) or 'nothing'}"
        raise InputError("file contains no named tensors", path=path, expected="a state dict", found=found)
    notes = list(file.notes)
    if others:
        listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        notes.append(f"{os.path.basename(path)}: entries that are not tensors are left out: {listed}")
    return TensorSet(tensors, (path,), tuple(notes), _checksums_of(tensors.values(), file.checksums))


def _checksums_of(tensors: Iterable[LazyTensor], checksums: Iterable[FileChecksum]) -> tuple[FileChecksum, ...]:
    """The checksums of the storages that hold these tensors; all of them if a tensor's location is unknown."""
    ordered = sorted(checksums, key=lambda checksum: checksum.segment.offset)
    starts, used = [checksum.segment.offset for checksum in ordered], set[int]()
    for tensor in tensors:
        stored = tensor.base if isinstance(tensor, Transposed) else tensor
        if not isinstance(stored, Stored):
            return tuple(ordered)
        used.update(bisect_right(starts, part.offset) - 1 for part in stored.parts)
    return tuple(ordered[i] for i in sorted(used) if i >= 0)


def read_torch_pickle(path: str | os.PathLike[str]) -> TorchFile:
    """The object in a PyTorch file, tensors lazy, everything else as plain data.

    Raises:
        InputError, UnsafeInputError, UnsupportedError: as :func:`read_torch`.
    """
    path = os.fspath(path)
    file_size(path)
    try:
        with open(path, "rb") as file:
            head = file.read(2)
            file.seek(0)
            if head[:1] == b"\x80":
                return _read_legacy(file, path)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    if head == b"PK":
        return _read_zip(path)
    explained = explain_file(path, allow={"pickle", "zip"}) or "does not begin like a PyTorch file"
    raise InputError(f"this file {explained}", path=path, expected="a file written by torch.save")


def read_if_torch(path: str) -> TorchFile | None:
    """:func:`read_torch_pickle`, but None if the file's extension or content is not PyTorch's.

    Raises:
        InputError, UnsafeInputError, UnsupportedError: as :func:`read_torch`, if the content is.
    """
    return read_torch_pickle(path) if path.endswith(SUFFIXES) and _begins_like_torch(path) else None


def _begins_like_torch(path: str) -> bool:
    """Whether a file begins with a pickle, or is a zip archive that may be torch.save's."""
    try:
        head = read_head(path)
    except InputError:
        return False
    if not head.startswith(b"PK"):
        return head.startswith(b"\x80")
    try:
        return any(name.endswith("/data.pkl") for name in read_members(path))
    except GptConvertError:  # damaged or compressed: read_torch_pickle raises the reason
        return True


def _read_zip(path: str) -> TorchFile:
    try:
        members = read_members(path)
    except UnsafeInputError as error:
        error.hint = f"save the weights alone, {RESAVE}"
        if "code/__torch__" in str(error):  # TorchScript compresses its code
            error.message = "this is a TorchScript program, which holds code (code/__torch__), not weights alone"
            error.expected, error.hint = "tensors in plain dictionaries", f"save the weights alone, {_RESAVE_SCRIPT}"
        raise
    root = _root(members, path)
    used: dict[str, Member] = {}

    def locate(key: str, elements: int, item: int) -> Segment:
        member, nbytes = members.get(f"{root}data/{key}"), elements * item
        if member is None:
            raise InputError(f"storage {key} is missing from the archive", path=path)
        if member.data.nbytes != nbytes:
            wrong = "is truncated" if member.data.nbytes < nbytes else "has more bytes than elements"
            expected, found = f"{nbytes} bytes", f"{member.data.nbytes} bytes"
            raise InputError(f"storage {key} {wrong}", path=path, expected=expected, found=found)
        used[key] = member
        return Segment(path, member.data.offset, nbytes)

    for name in RECORDS & {*(member.removeprefix(root) for member in members)}:
        _read_member(members[f"{root}{name}"])  # their checksums show damage
    rules = torch_rules(path, locate, _byte_order(members.get(f"{root}byteorder"), path))
    tree = load_pickle(io.BytesIO(_read_member(members[f"{root}data.pkl"])), rules, path)
    checksums = tuple(FileChecksum(m.data, "crc32", m.crc32, m.name) for m in used.values())
    return TorchFile(path, tree, checksums)


def _root(members: Mapping[str, Member], path: str) -> str:
    """The archive's top-level directory, with its slash."""
    roots = [name.removesuffix("data.pkl") for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise InputError(
            "this zip archive was not written by torch.save: it has no single data.pkl",
            path=path,
            found=", ".join(list(members)[:5]) or "an empty archive",
        )
    return roots[0]


def _read_member(member: Member) -> bytes:
    """A small member's bytes, verified against its checksum."""
    if member.data.nbytes > MAX_BYTES:
        expected, found = f"at most {MAX_BYTES} bytes", f"{member.data.nbytes} bytes"
        raise UnsafeInputError(f"{member.name} is too long", path=member.data.path, expected=expected, found=found)
    data = map_segment(member.data).tobytes()
    if zlib.crc32(data) != member.crc32:
        raise InputError(
            f"checksum mismatch in {member.name}: the file is damaged",
            path=member.data.path,
            expected=f"CRC-32 {member.crc32:08x}",
            found=f"{zlib.crc32(data):08x}",
        )
    return data


def _byte_order(member: Member | None, path: str) -> ByteOrder:
    orders: Mapping[bytes, ByteOrder] = {b"little": "<", b"big": ">"}
    data = b"little" if member is None else _read_member(member)
    if data not in orders:
        raise InputError("unknown byte order", path=path, expected="little or big", found=repr(data[:16]))
    return orders[data]


def _read_legacy(file: BinaryIO, path: str) -> TorchFile:
    """Five pickles (magic, protocol, machine, object, storage keys), then each storage: its length and elements."""
    sizes: dict[str, tuple[int, int]] = {}

    def measure(key: str, elements: int, item: int) -> Segment:
        if sizes.setdefault(key, (elements, item)) != (elements, item):
            raise InputError(f"storage {key} has two sizes", path=path)
        return Segment(path, 0, elements * item)

    rules = torch_rules(path, measure)
    if load_pickle(file, rules, path) != _LEGACY_MAGIC:
        raise InputError("this Python pickle was not written by torch.save", path=path, hint=f"save it {RESAVE}")
    protocol, _machine = load_pickle(file, rules, path), load_pickle(file, rules, path)
    if protocol != _LEGACY_PROTOCOL:
        raise UnsupportedError("unknown protocol", path=path, expected=_LEGACY_PROTOCOL, found=describe(protocol))
    start = file.tell()
    load_pickle(file, rules, path)
    keys = load_pickle(file, rules, path)
    places = _legacy_storages(file, keys, sizes, path)
    file.seek(start)
    tree = load_pickle(file, torch_rules(path, lambda key, _elements, _item: places[key]), path)
    note = f"{os.path.basename(path)}: PyTorch's format before version 1.6 records no checksums"
    return TorchFile(path, tree, notes=(note,))


def _legacy_storages(
    file: BinaryIO, keys: object, sizes: Mapping[str, tuple[int, int]], path: str
) -> dict[str, Segment]:
    """The byte range of each storage; ``keys`` gives their order in the file."""
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or sorted(keys) != sorted(sizes):
        raise InputError("the list of storages does not match the tensors", path=path)
    position, size, places = file.tell(), os.fstat(file.fileno()).st_size, {}
    end = position + sum(8 + elements * item for elements, item in sizes.values())
    if end > size:
        raise InputError(
            "file is truncated", path=path, expected=f"{end} bytes", found=f"{size} bytes", hint=FETCH_AGAIN
        )
    for key in keys:
        file.seek(position)
        (stored,) = struct.unpack("<q", file.read(8))
        elements, item = sizes[key]
        if stored != elements:
            expected, found = f"{elements} elements", f"{stored} elements"
            raise InputError(f"storage {key} is damaged", path=path, expected=expected, found=found)
        places[key] = Segment(path, position + 8, elements * item)
        position = places[key].end
    return places


def _unwrap(tree: object, name: str) -> tuple[Mapping[object, object], list[str]]:
    """The state dict inside ``tree``, and notes on the wrappers removed."""
    notes: list[str] = []
    for _ in range(len(WRAPPERS)):
        if not isinstance(tree, dict):
            return {}, notes
        inner = _wrapper(tree)
        if inner is None:
            break
        left = ", ".join(str(key) for key in list(tree)[:9] if key != inner)
        notes.append(f"{name}: the weights are stored under '{inner}'" + (f"; left out: {left}" if left else ""))
        tree = tree[inner]
    return tree if isinstance(tree, dict) else {}, notes


def _wrapper(tree: Mapping[object, object]) -> object | None:
    """The key of the state dict in a training script's dictionary; None if there are none or several."""
    known = next((key for key in WRAPPERS if _has_tensors(tree.get(key))), None)
    if known is not None or any(isinstance(value, LazyTensor) for value in tree.values()):
        return known
    found = [key for key, value in tree.items() if isinstance(key, str) and _has_tensors(value)]
    return found[0] if len(found) == 1 else None


def _has_tensors(value: object) -> bool:
    """Whether ``value`` is a state dict, or a wrapper around one."""
    if not isinstance(value, dict):
        return False
    inside = [value, *(value[key] for key in WRAPPERS if isinstance(value.get(key), dict))]
    return any(isinstance(leaf, LazyTensor) for each in inside for leaf in each.values())


def _kind(value: object) -> str:
    return value.what if isinstance(value, Opaque) else type(value).__name__
