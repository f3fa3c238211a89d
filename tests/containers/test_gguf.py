"""GGUF heads: those of the gguf package are read, ours are read by it, and damaged ones are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gptconvert.containers import gguf as container
from gptconvert.containers.gguf import TYPES, head_bytes, read_gguf, split_name
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError

METADATA: dict[str, Any] = {
    "general.architecture": "gpt2",
    "gpt2.block_count": 2,
    "gpt2.attention.layer_norm_epsilon": 1e-5,
    "gpt2.flag": True,
    "tokenizer.ggml.tokens": ["a", "Ġb", "", "日本"],
    "tokenizer.ggml.token_type": [1, 1, 5, -1],
    "tokenizer.ggml.merges": [],
}


def library_file(path: Path, **options: Any) -> Path:
    """A file of the gguf package, with every type of value, and tensors of several types."""
    writer = gguf.GGUFWriter(path, "gpt2", **options)
    writer.add_uint8("k.u8", 255)
    writer.add_int8("k.i8", -128)
    writer.add_uint16("k.u16", 65535)
    writer.add_int16("k.i16", -3)
    writer.add_int32("k.i32", -70000)
    writer.add_uint64("k.u64", 1 << 63)
    writer.add_int64("k.i64", -(1 << 63))
    writer.add_float32("k.f32", 0.5)
    writer.add_float64("k.f64", 0.1)
    writer.add_bool("k.bool", True)
    writer.add_string("k.text", "höhe")
    writer.add_array("k.texts", ["x", "y"])
    writer.add_array("k.floats", [0.5, 1.5])
    writer.add_array("k.flags", [True, False])
    random = np.random.default_rng(0)
    writer.add_tensor("a", random.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("b", random.standard_normal(7).astype(np.float16))
    rows = random.standard_normal((4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("c", gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_the_library(tmp_path: Path) -> None:
    path = library_file(tmp_path / "model.gguf")
    model, reader = read_gguf(path), gguf.GGUFReader(path)
    for key, value in model.metadata.items():
        assert value == reader.fields[key].contents(), key
    assert [*model.tensors] == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        found = model.tensors[tensor.name]
        assert found.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert found.type.number == tensor.tensor_type
        assert found.stored.read().tobytes() == tensor.data.tobytes()


def test_files_of_a_split_model(tmp_path: Path) -> None:
    library_file(tmp_path / "model.gguf", split_max_tensors=1)
    first = tmp_path / split_name("model", 0, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [split_name("model", i, 3) for i in range(3)]
    model = read_gguf(first)
    assert len(model.files) == 3 and [*model.tensors] == ["a", "b", "c"] and model.metadata["k.text"] == "höhe"
    with pytest.raises(InputError, match=r"split\.no"):
        read_gguf(tmp_path / split_name("model", 1, 3))
    (tmp_path / "other.gguf").write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="not the name"):
        read_gguf(tmp_path / "other.gguf")
    (tmp_path / split_name("model", 2, 3)).unlink()
    with pytest.raises(InputError, match="missing"):
        read_gguf(first)


def test_the_library_reads_ours(tmp_path: Path) -> None:
    path, rows = tmp_path / "model.gguf", np.arange(6, dtype=np.float32).reshape(2, 3)
    entries = [("one", TYPES["F32"], (2, 3), 0), ("two", TYPES["F16"], (5,), 32)]
    content = head_bytes({**METADATA, "split.no": (container.UINT16, 7)}, entries)
    path.write_bytes(
        content + rows.tobytes().ljust(32, b"\0") + np.arange(5, dtype=np.float16).tobytes().ljust(32, b"\0")
    )
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        if value != []:
            assert reader.fields[key].contents() == pytest.approx(value), key
    assert reader.fields["split.no"].types == [gguf.GGUFValueType.UINT16]
    assert np.array_equal(reader.tensors[0].data, rows) and reader.tensors[1].data.tolist() == [0, 1, 2, 3, 4]
    ours = read_gguf(path)
    assert (
        ours.metadata["tokenizer.ggml.token_type"] == [1, 1, 5, -1] and ours.metadata["tokenizer.ggml.merges"] == []
    )


def simple(keys: bytes = b"", count: int = 0, tensors: bytes = b"", number: int = 0, data: bytes = b"") -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, number, count) + keys + tensors
    return head + bytes(-len(head) % 32) + data


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", kind, offset)


DAMAGED: dict[str, tuple[bytes, type[GptConvertError], str]] = {
    "magic": (b"GGML" + bytes(40), InputError, "not a GGUF file"),
    "empty": (b"", InputError, "is empty"),
    "version 1": (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), UnsupportedError, "unknown version"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), UnsupportedError, "big-endian"),
    "head cut": (struct.pack("<4sIQ", b"GGUF", 3, 0), InputError, "truncated"),
    "tensors": (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 0), InputError, "too many tensors"),
    "keys": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60), InputError, "too many metadata keys"),
    "key too long": (simple(struct.pack("<Q", 1 << 40), 1), InputError, "too long"),
    "key not text": (simple(key(b"\xff\xfe", 4, bytes(4)), 1), InputError, "not UTF-8"),
    "key twice": (simple(key(b"a", 4, bytes(4)) * 2, 2), InputError, "twice"),
    "value type": (simple(key(b"a", 77, bytes(4)), 1), InputError, "unknown type of metadata"),
    "array type": (simple(key(b"a", 9, struct.pack("<IQ", 9, 0)), 1), InputError, "in an array"),
    "array count": (simple(key(b"a", 9, struct.pack("<IQ", 8, 1 << 62)), 1), InputError, "too much metadata"),
    "array cut": (simple(key(b"a", 9, struct.pack("<IQ", 6, 999)), 1), InputError, "truncated"),
    "text cut": (simple(key(b"a", 8, struct.pack("<Q", 1 << 30)), 1), InputError, "too long"),
    "alignment": (simple(key(b"general.alignment", 4, struct.pack("<I", 24)), 1), InputError, "power of two"),
    "axes": (simple(tensors=tensor(b"t", (1,) * 5, 0, 0), number=1, data=bytes(32)), InputError, "too many axes"),
    "type": (simple(tensors=tensor(b"t", (1,), 999, 0), number=1), UnsupportedError, "unknown tensor type"),
    "overflow": (simple(tensors=tensor(b"t", (1 << 40, 1 << 40), 0, 0), number=1), InputError, "overflows"),
    "block": (simple(tensors=tensor(b"t", (2, 33), 2, 0), number=1, data=bytes(64)), InputError, "multiple of 32"),
    "offset": (simple(tensors=tensor(b"t", (2,), 0, 32), number=1, data=bytes(64)), InputError, "one before it ends"),
    "data cut": (simple(tensors=tensor(b"t", (9,), 0, 0), number=1, data=bytes(32)), InputError, "truncated"),
    "data long": (simple(tensors=tensor(b"t", (8,), 0, 0), number=1, data=bytes(64)), InputError, "bytes follow"),
    "name twice": (simple(tensors=tensor(b"t", (8,), 0, 0) * 2, number=2, data=bytes(64)), InputError, "this name"),
    "split count": (simple(key(b"split.count", 4, struct.pack("<I", 5000)), 1), InputError, "wrong value"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_heads(name: str, tmp_path: Path) -> None:
    content, error, message = DAMAGED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        read_gguf(path)
    assert caught.value.path == str(path)


def test_every_prefix_and_flipped_byte_of_a_head(tmp_path: Path) -> None:
    """Only our own errors, and no large allocation."""
    whole = library_file(tmp_path / "model.gguf").read_bytes()
    changes: list[Callable[[int], bytes]] = [lambda at: whole[:at], lambda at: whole[:at] + b"\xff" + whole[at + 1 :]]
    path = tmp_path / "damaged.gguf"
    for change in changes:
        for at in range(0, 900, 3):
            path.write_bytes(change(at))
            try:
                read_gguf(path)
            except GptConvertError:
                continue


def test_a_later_file_that_links_out(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    library_file(inside / "model.gguf", split_max_tensors=1)
    last = inside / split_name("model", 2, 3)
    last.rename(tmp_path / "secret")
    last.symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeInputError, match="links out"):
        read_gguf(inside / split_name("model", 0, 3))
