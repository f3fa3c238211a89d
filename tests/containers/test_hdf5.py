"""HDF5 files: every layout is read; links to other data, expansion and code are refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gptconvert.containers.hdf5 import find, find_group, lazy_tensor, names_in, open_hdf5
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.tensors import LazyTensor, Stored

NAME = "m/layer/w/kernel:0"


def file_with(path: Path, make: Any) -> str:
    """A file whose group ``layer`` is filled by ``make(group)``, at :data:`NAME`."""
    with h5py.File(path, "w") as file:
        make(file.create_group("layer"))
    return str(path)


def read(path: str) -> LazyTensor:
    """The dataset at :data:`NAME`."""
    with open_hdf5(path) as file:
        return lazy_tensor(find(file, f"layer/{NAME}", path), path)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("layout", ["contiguous", "chunked", "compact", "userblock"])
def test_layouts_and_types(tmp_path: Path, dtype: str, layout: str) -> None:
    values = np.arange(20).reshape(4, 5).astype(dtype)
    path = tmp_path / "w.h5"
    with h5py.File(path, "w", **({"userblock_size": 512} if layout == "userblock" else {})) as file:
        group = file.create_group("layer")
        if layout == "compact":
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_layout(h5py.h5d.COMPACT)
            plist_link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
            plist_link.set_create_intermediate_group(True)
            space, kind = h5py.h5s.create_simple((4, 5)), h5py.h5t.py_create(np.dtype(dtype))
            made = h5py.h5d.create(group.id, NAME.encode(), kind, space, plist, plist_link)
            made.write(h5py.h5s.ALL, h5py.h5s.ALL, values)
        else:
            group.create_dataset(NAME, data=values, chunks=(3, 2) if layout == "chunked" else None)
    tensor = read(str(path))
    assert np.array_equal(tensor.read(), values)
    assert np.array_equal(tensor.read((slice(1, 4), slice(2, 3))), values[1:4, 2:3])


def external_storage(group: Any) -> None:
    group.create_dataset(NAME, (2, 2), "f4", external=[("/etc/passwd", 0, 16)])


def virtual(group: Any) -> None:
    layout = h5py.VirtualLayout((2, 2), "f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (2, 2))
    group.create_virtual_dataset(NAME, layout)


def soft(group: Any) -> None:
    group.create_dataset("real", data=np.ones((2, 2), "f4"))
    group.create_group("m/layer/w")
    group["m/layer/w/kernel:0"] = h5py.SoftLink("/layer/real")


def external_link(group: Any) -> None:
    group.create_group("m")
    group["m/layer"] = h5py.ExternalLink("/tmp/other.h5", "/layer")


def bomb(group: Any) -> None:
    group.create_dataset(NAME, (1 << 20, 1 << 12), "f4", chunks=(1 << 10, 1 << 10), compression="gzip")


def huge_chunk(group: Any) -> None:
    data = group.create_dataset(NAME, (1 << 15, 1 << 12), "f4", chunks=(1 << 15, 1 << 12), compression="gzip")
    data[:] = 0


def holes(group: Any) -> None:
    data = group.create_dataset(NAME, (8, 8), "f4", chunks=(4, 4))
    data[:4] = 1


def never_written(group: Any) -> None:
    group.create_dataset(NAME, (8, 8), "f4")


def lzf(group: Any) -> None:
    group.create_dataset(NAME, data=np.ones((8, 8), "f4"), compression="lzf")


def integers(group: Any) -> None:
    group.create_dataset(NAME, data=np.ones((2, 2), "i4"))


def text(group: Any) -> None:
    group.create_dataset(NAME, data=np.array([b"a", b"b"]))


def empty(group: Any) -> None:
    group.create_dataset(NAME, data=h5py.Empty("f4"))


def absent(group: Any) -> None:
    group.create_group("m")


def a_group(group: Any) -> None:
    group.create_group(NAME)


BAD: Sequence[tuple[Any, type[GptConvertError], str]] = [
    (external_storage, UnsafeInputError, "external storage"),
    (virtual, UnsafeInputError, "virtual dataset"),
    (soft, UnsafeInputError, "soft link"),
    (external_link, UnsafeInputError, r"external link.*other\.h5"),
    (bomb, UnsafeInputError, "expands beyond reason"),
    (huge_chunk, UnsafeInputError, "expands beyond reason"),
    (holes, InputError, "2 of 4 chunks"),
    (never_written, InputError, "never written"),
    (lzf, UnsupportedError, "filter 32000"),
    (integers, UnsupportedError, "int32"),
    (text, UnsupportedError, "element type"),
    (empty, UnsupportedError, "element type"),
    (absent, InputError, "missing from the file"),
    (a_group, InputError, "a group where a weight should be"),
]
SLOW = pytest.mark.slow  # compresses 512 MiB of zeros


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [pytest.param(*row, id=row[0].__name__, marks=SLOW if row[0] is huge_chunk else ()) for row in BAD],
)
def test_38_39_bad_datasets(tmp_path: Path, make: Any, error: type[GptConvertError], message: str) -> None:
    with pytest.raises(error, match=message):
        read(file_with(tmp_path / "w.h5", make))


def test_38_the_target_of_an_external_link_is_not_opened(tmp_path: Path) -> None:
    """Opening the named pipe behind the link would hang."""
    os.mkfifo(tmp_path / "pipe.h5")

    def link(group: Any) -> None:
        group["m"] = h5py.ExternalLink(str(tmp_path / "pipe.h5"), "/")

    with pytest.raises(UnsafeInputError, match="external link"):
        read(file_with(tmp_path / "w.h5", link))


def test_damaged_chunk_is_detected_when_read(tmp_path: Path) -> None:
    def packed(group: Any) -> None:
        values = np.random.default_rng(0).standard_normal((64, 64)).astype("f4")
        group.create_dataset(NAME, data=values, chunks=(64, 64), fletcher32=True)

    path = Path(file_with(tmp_path / "w.h5", packed))
    tensor, data = read(str(path)), bytearray(path.read_bytes())
    data[-3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        tensor.read()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([b"a", b"b"], None, ""),
        ([1, 2], InputError, "does not hold names"),
        ([b"a", b""], InputError, "does not hold names"),
        (np.array([b"x" * 20_000]), UnsafeInputError, "too large"),
        (np.zeros(8000), InputError, "does not hold names"),
    ],
)
def test_lists_of_names(tmp_path: Path, values: Any, error: type[GptConvertError] | None, message: str) -> None:
    path = file_with(tmp_path / "w.h5", lambda group: group.attrs.create("names", values))
    with open_hdf5(path) as file:
        attributes = find_group(file, "layer", path).attrs
        if error is None:
            assert names_in(attributes, "names", path) == ["a", "b"]
        else:
            with pytest.raises(error, match=message):
                names_in(attributes, "names", path)


def test_names_of_variable_length(tmp_path: Path) -> None:
    """A few names are read; many references, which could all be to one enormous name, are not."""

    def variable(values: list[str]) -> str:
        kind = h5py.string_dtype()
        return file_with(tmp_path / "w.h5", lambda group: group.attrs.create("names", values, dtype=kind))

    path = variable(["a", "b"])
    with open_hdf5(path) as file:
        assert names_in(find_group(file, "layer", path).attrs, "names", path) == ["a", "b"]
    path = variable(["a" * 200_000] + ["b"] * 2000)
    with open_hdf5(path) as file, pytest.raises(UnsupportedError, match="variable length"):
        names_in(find_group(file, "layer", path).attrs, "names", path)


def test_a_dataset_where_a_group_should_be(tmp_path: Path) -> None:
    path = file_with(tmp_path / "w.h5", lambda group: group.create_dataset("x", data=np.ones(2)))
    with open_hdf5(path) as file, pytest.raises(InputError, match="a dataset where a group"):
        find_group(file, "layer/x", path)


def test_contiguous_data_becomes_a_byte_range(tmp_path: Path) -> None:
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    path = file_with(tmp_path / "w.h5", lambda group: group.create_dataset(NAME, data=values))
    tensor = read(path)
    assert isinstance(tensor, Stored) and tensor.parts[0].nbytes == 24
    os.truncate(path, tensor.parts[0].end - 1)
    with pytest.raises(InputError, match=r"truncated|damaged"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x89HDF" + bytes(99)])
def test_other_files_are_identified(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.h5").write_bytes(content)
    with pytest.raises(InputError, match=r"empty|git lfs pull|damaged"):
        read(str(tmp_path / "w.h5"))


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_with(tmp_path / "w.h5", lambda group: None)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UnsupportedError) as caught:
        read(path)
    assert caught.value.hint == "pip install 'h5py>=3.11'"


def test_a_float_type_with_another_layout_of_bits(tmp_path: Path) -> None:
    """h5py states float64 and converts; the bytes in the file are not float64."""

    def make(group: Any) -> None:
        kind = h5py.h5t.IEEE_F64LE.copy()
        kind.set_fields(63, 52, 11, 0, 50)
        space = h5py.h5s.create_simple((2,))
        folder, name = NAME.rsplit("/", 1)
        made = h5py.h5d.create(group.create_group(folder).id, name.encode(), kind, space)
        made.write(space, space, np.array([1.0, 2.0]))

    path = file_with(tmp_path / "w.h5", make)
    with h5py.File(path) as file:
        assert file[f"layer/{NAME}"].dtype == np.float64
    with pytest.raises(UnsupportedError, match="another layout of bits"):
        read(path)
