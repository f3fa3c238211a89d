"""Archives of arrays (``numpy.savez``), read lazily: each array is a byte range of the archive."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from gptconvert.containers.npy import array_in
from gptconvert.containers.untrusted import explain_file, file_size
from gptconvert.containers.zip import read_members
from gptconvert.errors import InputError
from gptconvert.model.tensors import FileChecksum, LazyTensor


@dataclass(frozen=True)
class Archive:
    """The contents of one ``.npz`` file.

    Attributes:
        arrays: by name, in the order of the archive.
        checksums: by name, over the whole member, array header included.
    """

    arrays: dict[str, LazyTensor]
    checksums: dict[str, FileChecksum]


def read_npz(path: str | os.PathLike[str], void2: np.dtype[np.generic] | None = None) -> Archive:
    """The arrays of the archive ``path``.

    Args:
        path: the file.
        void2: dtype of elements of two untyped bytes (``|V2``); None refuses them.

    Raises:
        InputError: not an archive, or a damaged one.
        UnsafeInputError: compressed members (``numpy.savez_compressed``), arrays of Python objects.
        UnsupportedError: elements that are not plain numbers.
    """
    path = os.fspath(path)
    file_size(path)
    explained = explain_file(path, allow={"zip"})
    if explained is not None:
        raise InputError(f"this file {explained}", path=path, expected="an archive written by numpy.savez")
    arrays, checksums = {}, {}
    members = read_members(path)
    try:
        with open(path, "rb") as file:
            for member in members.values():
                name = member.name.removesuffix(".npy")
                arrays[name] = array_in(file, member.data, member.name, void2)
                checksums[name] = FileChecksum(member.data, "crc32", member.crc32, member.name)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    return Archive(arrays, checksums)
