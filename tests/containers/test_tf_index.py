"""The index of a TensorFlow checkpoint: byte-identical to TensorFlow's, and malformed files are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.containers.crc import mask, unmask
from gptconvert.containers.tf_index import WHOLE, Entry, index_bytes, piece_key, read_index
from gptconvert.errors import GptConvertError, InputError, UnsupportedError
from tests.containers import bundle_bytes as made
from tests.helpers import FIXTURES

TENSORS = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b/c": np.arange(5, dtype=np.int64)}
#: Written by TensorFlow's Saver.
BUNDLES = sorted(
    path
    for name in ("", "-bf16", "-f16", "-sharded", "-adam", "-partitioned")
    for path in (FIXTURES / "tiny-gpt2" / f"openai-tf{name}").glob("*.index")
)


# --- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_index_is_tensorflows_byte_for_byte(path: Path) -> None:
    index = read_index(str(path.with_suffix("")))
    tensors = dict(reversed(index.tensors.items()))
    assert index_bytes(tensors, index.shards, index.pieces) == path.read_bytes()


def test_fixtures_are_present() -> None:
    assert len(BUNDLES) >= 7


SIZES = st.integers(0, 300)
WHOLES = st.builds(
    Entry,
    data_type=st.integers(0, 25),
    shape=st.lists(SIZES, max_size=3).map(tuple),
    offset=st.integers(0, 1 << 50),
    nbytes=st.integers(0, 1 << 50),
    crc32c=st.integers(0, (1 << 32) - 1),
    shard=st.integers(0, 2),
)
EXTENTS = st.lists(st.tuples(SIZES, st.one_of(SIZES, st.just(WHOLE))), max_size=3).map(tuple)
#: A partitioned variable has no checksum.
PARTITIONED = st.builds(
    Entry,
    data_type=st.integers(1, 25),
    shape=st.lists(SIZES, max_size=3).map(tuple),
    offset=st.just(0),
    nbytes=st.just(0),
    crc32c=st.just(unmask(0)),
    slices=st.lists(EXTENTS, min_size=1, max_size=3).map(tuple),
)
NAMES = st.text(min_size=1, max_size=8).filter(lambda name: not name.startswith("\0"))


@given(
    st.dictionaries(NAMES, st.one_of(WHOLES, PARTITIONED), max_size=6),
    st.dictionaries(st.tuples(NAMES, EXTENTS), WHOLES, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_read_is_the_inverse_of_write(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, Entry],
    pieces: dict[tuple[str, tuple[tuple[int, int], ...]], Entry],
) -> None:
    prefix = tmp_path_factory.getbasetemp() / "round"
    keyed = {piece_key(*piece): entry for piece, entry in pieces.items()}
    Path(f"{prefix}.index").write_bytes(index_bytes(tensors, 3, keyed))
    index = read_index(str(prefix))
    assert (index.tensors, index.pieces, index.shards, index.big_endian) == (tensors, keyed, 3, False)


@given(st.integers(0, (1 << 32) - 1))
def test_unmask_is_the_inverse_of_mask(checksum: int) -> None:
    assert unmask(mask(checksum)) == checksum


# --- bad input ----------------------------------------------------------------------------------------------------


BAD_INDEX: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty file": (lambda good: b"", "is empty"),
    "git lfs pointer": (lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "Git LFS"),
    "web page": (lambda good: b"<!DOCTYPE html><title>404</title>", "HTML page"),
    "text": (lambda good: b"AccessDenied", "text file that begins with 'AccessDenied'"),
    "compressed": (lambda good: b"\x1f\x8b" + good, "gzip"),
    "truncated by one byte": (lambda good: good[:-1], "magic number"),
    "truncated to its middle": (lambda good: good[: len(good) // 2], "magic number"),
    "only the footer": (lambda good: good[-48:], "does not fit"),
    "wrong magic": (lambda good: good[:-8] + b"\x56" + good[-7:], "magic number"),
    "flipped bit in a block": (lambda good: good[:9] + bytes([good[9] ^ 4]) + good[10:], "checksum mismatch"),
    "something in front": (lambda good: b"\0" + good, "index"),
    "address beyond the file": (lambda good: good[:-48] + (b"\xff\xff\x7f" * 4).ljust(40, b"\0") + made.MAGIC, "fit"),
    "endless number": (lambda good: good[:-48] + b"\xff" * 40 + made.MAGIC, "64 bits"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_damaged_index(tmp_path: Path, name: str) -> None:
    prefix = str(made.write_bundle(tmp_path / "m", TENSORS))
    damage, message = BAD_INDEX[name]
    Path(prefix + ".index").write_bytes(damage(Path(prefix + ".index").read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        read_index(prefix)
    assert caught.value.path == prefix + ".index"
    assert caught.value.exit_code == 3


def test_no_header(tmp_path: Path) -> None:
    (tmp_path / "m.index").write_bytes(made.table([(b"a", made.entry(1, ()))]))
    with pytest.raises(InputError, match="has no header"):
        read_index(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ({"shards": 0}, InputError, "0 data files"),
        ({"shards": 1 << 40}, InputError, "1099511627776 data files"),
        ({"endianness": 2}, InputError, "byte order 2"),
        ({"minimum": 2}, UnsupportedError, "bundle version 2"),
        ({"excluded": made.number(3, 2) + made.number(3, 1)}, UnsupportedError, "excludes readers"),
        ({"excluded": made.text(3, b"\x02\x01")}, UnsupportedError, "excludes readers"),  # packed
    ],
    ids=str,
)
def test_bad_header(tmp_path: Path, head: dict[str, Any], error: type[GptConvertError], message: str) -> None:
    with pytest.raises(error, match=message):
        read_index(made.write_entries(tmp_path, **head))


def test_tensor_name_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        read_index(made.write_entries(tmp_path, (b"\xff\xfe", made.entry(1, (4,), size=16))))


def test_missing_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing") as caught:
        read_index(str(tmp_path / "m"))
    assert caught.value.path == str(tmp_path / "m.index")


def test_oversized_index_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "m.index").touch()
    os.truncate(tmp_path / "m.index", 1 << 40)
    with pytest.raises(InputError, match="too large"):
        read_index(str(tmp_path / "m"))
