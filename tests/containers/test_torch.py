"""The reader of torch.save's files compared with ``torch.load(weights_only=True)``, and tested on hostile files."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.containers.pickle import Opaque
from gptconvert.containers.torch import read_torch, read_torch_pickle
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError, UnsupportedError
from gptconvert.model.tensors import Stored, TensorSet, Transposed, map_segment
from tests.containers.torch_files import LAYOUTS, rewrite, save, zip_of
from tests.helpers import FIXTURES, ROOT


def to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    """A torch tensor as numpy, bfloat16 included."""
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
    return tensor.detach().numpy()  # type: ignore[no-any-return]


def assert_equal(tensors: TensorSet, expected: Mapping[str, Any]) -> None:
    """Compare names, their order, and each tensor's dtype, shape and bits."""
    assert list(tensors) == list(expected)
    for name, torch_tensor in expected.items():
        tensor, array = tensors[name], to_numpy(torch_tensor)
        assert (tensor.dtype.newbyteorder("="), tensor.shape) == (array.dtype, array.shape), name
        assert tensor.read().tobytes() == np.ascontiguousarray(array).tobytes(), name
        joined = b"".join(chunk.tobytes() for chunk in tensor.chunks(max_bytes=64))
        assert joined == np.ascontiguousarray(array).tobytes(), name


def varied() -> dict[str, Any]:
    """Tensors of every dtype and layout."""
    import torch

    torch.manual_seed(0)
    base = torch.randn(7, 5)
    dtypes = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split()
    return {
        **{name: (torch.arange(12).reshape(4, 3) - 3).to(getattr(torch, name)) for name in dtypes},
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "base": base,
        "tied": base,
        "rows": base[2:5],
        "one row": base[3],
        "transposed": base.t(),
        "transposed bfloat16": torch.randn(6, 5).to(torch.bfloat16).t(),
        "part of transposed": base.t()[1:3],
        "every other": base[::2, 1:4],
        "column": base[:, 2],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 9),
        "permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
        "permuted bfloat16": torch.randn(3, 4, 5).to(torch.bfloat16).permute(1, 2, 0),
        "unit axes": torch.randn(1, 6, 1).transpose(0, 2),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_equals_torch(tmp_path: Path, layout: str, protocol: int) -> None:
    import torch

    # torch cannot read its own legacy files with unsigned types wider than a byte, and its restricted reader supports
    # protocol 2 only: the reference is loaded from the same tensors saved that way.
    values = {k: v for k, v in varied().items() if layout == "zip" or k not in ("uint16", "uint32", "uint64")}
    expected = torch.load(save(tmp_path / "reference.bin", values, layout), weights_only=True)
    path = save(tmp_path / "x.bin", values, layout, protocol)
    tensors = read_torch(path)
    assert_equal(tensors, expected)
    assert tensors.files == (path,)
    assert bool(tensors.checksums) == (layout == "zip")


@pytest.mark.parametrize("name", ["hf-bin", "hf-bin-legacy"])
def test_fixture_equals_torch(name: str) -> None:
    import torch

    path = FIXTURES / "tiny-gpt2" / name / "pytorch_model.bin"
    assert_equal(read_torch(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_contiguous_is_stored_and_transposed_is_a_view(tmp_path: Path, layout: str) -> None:
    tensors = read_torch(save(tmp_path / "x.bin", varied(), layout))
    stored = [name for name, tensor in tensors.items() if isinstance(tensor, Stored)]
    assert {"float32", "bfloat16", "base", "rows", "one row", "scalar", "unit axes", "uint16"} <= set(stored)
    assert isinstance(tensors["transposed"], Transposed)
    assert tensors["transposed"].segments() is None
    assert tensors["transposed"].base.segments() == tensors["base"].segments() == tensors["tied"].segments()


def test_big_endian_equals_torch(tmp_path: Path) -> None:
    import torch

    values = {
        name: tensor for name, tensor in varied().items() if name in ("float32", "bfloat16", "int64", "permuted")
    }
    plain = save(tmp_path / "little.bin", values)
    sizes = {"float32": 4, "bfloat16": 2, "int64": 8, "permuted": 4}

    def swapped(name: str, data: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return b"big"
        if "/data/" not in name:
            return data
        size = list(sizes.values())[int(name.rsplit("/", 1)[1])]
        return np.frombuffer(data, f"V{size}").view(np.uint8).reshape(-1, size)[:, ::-1].tobytes()

    path = rewrite(plain, tmp_path / "big.bin", swapped)
    expected = torch.load(path, weights_only=True)
    np.testing.assert_array_equal(expected["int64"].numpy(), values["int64"].numpy())
    assert_equal(read_torch(path), expected)
    assert read_torch(path)["float32"].segments() is None, "swapped bytes must not be copied raw"


def test_torch_is_not_imported(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{layout}.bin", varied(), layout) for layout in LAYOUTS]
    code = (
        "import sys; from gptconvert.containers.torch import read_torch\n"
        "for path in sys.argv[1:]:\n"
        "    for tensor in read_torch(path).values(): tensor.read()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_tree_keeps_everything_else_as_plain_data(tmp_path: Path) -> None:
    """Data that nanoGPT and DeepSpeed save beside the weights."""
    import torch

    linear = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    value = {
        "model": linear.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": 2, "bias": False, "dropout": 0.1, "vocab_size": None},
        "best": np.float64(1.5),
        "size": torch.Size([2, 3]),
        "set": [True, (1, "x", b"bytes")],
        "device": torch.device("cpu"),
    }
    tree: Any = read_torch_pickle(save(tmp_path / "ckpt.pt", value)).tree
    assert tree["model_args"] == value["model_args"]
    assert tree["size"] == (2, 3)
    assert tree["set"][0] is True
    assert tree["set"][1][:2] == (1, "x")
    assert [tree["best"], tree["device"]] == [Opaque("numpy scalar"), Opaque("device")]
    state = tree["optimizer"]["state"]
    np.testing.assert_array_equal(state[0]["exp_avg"].read(), optimizer.state[linear.weight]["exp_avg"].numpy())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_29_wrapped_state_dicts_are_unwrapped(tmp_path: Path, layout: str, key: str) -> None:
    import torch

    state = torch.nn.Linear(3, 2).state_dict()
    tensors = read_torch(save(tmp_path / "x.bin", {"epoch": 3, "best": torch.tensor(2.0), key: state}, layout))
    assert_equal(tensors, state)
    assert any(f"'{key}'" in note and "epoch" in note for note in tensors.notes)


def test_29_nested_wrapping_and_extras(tmp_path: Path) -> None:
    import torch

    state = {"module.w": torch.ones(2), "module.step": 7}
    tensors = read_torch(save(tmp_path / "x.bin", {"model": {"state_dict": state}}))
    assert list(tensors) == ["module.w"]
    assert any("module.step (int)" in note for note in tensors.notes)
    assert any("'state_dict'" in note for note in tensors.notes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_29_whole_module_is_refused_with_a_hint(tmp_path: Path, layout: str) -> None:
    import torch

    with pytest.raises(UnsafeInputError) as caught:
        read_torch(save(tmp_path / "x.bin", torch.nn.Linear(3, 2), layout))
    assert "torch.nn.modules.linear.Linear" in str(caught.value)
    assert "model.state_dict()" in str(caught.value.hint)


@pytest.mark.parametrize("value", [{}, {"a": 1}, [1, 2], "text", {"a": {"b": 1}}])
def test_no_named_tensors(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match="no named tensors"):
        read_torch(save(tmp_path / "x.bin", value))


@pytest.mark.parametrize("key", ["net", "weights", "ema", "generator"])
def test_the_only_state_dict_is_found_under_any_key(tmp_path: Path, key: str) -> None:
    import torch

    state = {"w": torch.ones(2, 3)}
    found = read_torch(save(tmp_path / "x.bin", {key: state, "optimizer": {"state": {0: state}}, "epoch": 1}))
    assert list(found) == ["w"]
    assert f"x.bin: the weights are stored under '{key}'; left out: optimizer, epoch" in found.notes
    assert list(read_torch(save(tmp_path / "y.bin", {"checkpoint": {"model": state}}))) == ["w"]
    with pytest.raises(InputError, match="no named tensors"):
        read_torch(save(tmp_path / "z.bin", {key: state, "other": state}))


def test_tensors_with_attributes_of_their_own(tmp_path: Path) -> None:
    """Megatron-LM and DeepSpeed set attributes on parameters, which change how PyTorch saves them."""
    import torch

    parameter, plain = torch.nn.Parameter(torch.ones(2, 3)), torch.full((3,), 2.0)
    parameter.partition_dim, plain.origin = 0, "x"
    found = read_torch(save(tmp_path / "x.bin", {"a": parameter, "b": plain}))
    np.testing.assert_array_equal(found["a"].read(), np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(found["b"].read(), np.full(3, 2, np.float32))
    data = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nSize\nctorch\nTensor\n)}tR."
    with pytest.raises(InputError, match="damaged"):
        read_torch(zip_of(tmp_path / "y.bin", data))
    data = data.replace(b"ctorch\nTensor\n", b"cos\nsystem\n")
    with pytest.raises(UnsafeInputError, match=r"refused global os\.system"):
        read_torch(zip_of(tmp_path / "y.bin", data))


def test_quantised_tensors(tmp_path: Path) -> None:
    import torch

    tensor = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)
    with pytest.raises(UnsupportedError, match=r"torch\.ao\.quantization"):
        read_torch(save(tmp_path / "x.bin", {"w": tensor}))


def test_a_safetensors_file_under_another_name(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.ones(3, np.float32)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"is a safetensors file: rename it"):
        read_torch(tmp_path / "pytorch_model.bin")


# Damaged files.


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A state dict of two tensors."""
    import torch

    return save(tmp_path / "small.bin", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)})


def pickled(source: str, target: Path, old: bytes, new: bytes) -> str:
    """``source`` with ``old`` replaced by ``new`` in its pickle."""

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        assert old in data
        return data.replace(old, new)

    return rewrite(source, target, change)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:7c5d\nsize 548118077\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"\x93NUMPY\x01\0", "NumPy"),
        (bytes(200), "zero bytes"),
    ],
)
def test_22_something_else(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_torch(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.1])
def test_21_truncated_zip(small: str, keep: float) -> None:
    content = Path(small).read_bytes()
    Path(small).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match="central directory"):
        read_torch(small)


def test_28_truncated_legacy(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "x.bin", varied(), "legacy"))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"truncated; expected {len(content)} bytes, found {len(content) - 1} bytes"):
        read_torch(path)
    path.write_bytes(content[:300])
    with pytest.raises(InputError):
        read_torch(path)


def test_24_checksums_cover_every_tensor_and_show_a_flipped_bit(small: str) -> None:
    """Comparing the checksums finds the flipped bit; torch.load misses it."""
    content = bytearray(Path(small).read_bytes())
    content[content.index(np.float32(5.0).tobytes())] ^= 1
    Path(small).write_bytes(content)
    tensors = read_torch(small)
    state = {c.what: zlib.crc32(map_segment(c.segment)) == c.value for c in tensors.checksums}
    assert state == {"small/data/0": False, "small/data/1": True}
    assert {c.algorithm for c in tensors.checksums} == {"crc32"}
    covered = {c.segment.offset for c in tensors.checksums}
    assert covered == {s.offset for t in tensors.values() for s in t.segments() or ()}


def test_24_flipped_bit_in_the_pickle_is_found_on_opening(small: str) -> None:
    content = Path(small).read_bytes()
    Path(small).write_bytes(content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3", 1))
    with pytest.raises(InputError, match=r"checksum mismatch in small/data\.pkl"):
        read_torch(small)


def test_zip_archive_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(InputError, match=r"no single data\.pkl"):
        read_torch(tmp_path / "x.npz")


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path: Path) -> None:
    import torch

    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "x.pt"))
    with pytest.raises(UnsafeInputError, match=r"code/__torch__") as caught:
        read_torch(tmp_path / "x.pt")
    assert "TorchScript" in str(caught.value)
    assert "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'pytorch_model.bin')" in str(caught.value.hint)


def test_a_lightning_checkpoint_with_paths(tmp_path: Path) -> None:
    import torch

    state = {"model.w": torch.ones(2, 3)}
    content = {"epoch": 1, "state_dict": state, "hyper_parameters": {"data": Path("/data"), "lr": 0.1}}
    torch.save(content, tmp_path / "last.ckpt")
    assert list(read_torch(tmp_path / "last.ckpt")) == ["model.w"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"K\x02K\x03\x86", b"K\x02K\x09\x86", "storage 0 is smaller than a tensor of size (2, 9)"),
        (b"K\x03K\x01\x86", b"K\x09K\x01\x86", "storage 0 is smaller"),
        (b"K\x03K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", "negative"),
        (b"QK\x00K\x02", b"QK\x01K\x02", "storage 0 is smaller"),
        (b"QK\x00K\x02", b"QJ\xff\xff\xff\xffK\x02", "negative"),
        (b"K\x02K\x03\x86", b"J\xfe\xff\xff\xffJ\xfd\xff\xff\xff\x86", "negative"),
        (b"K\x02K\x03\x86", b"\x8a\x08\0\0\0\0\0\0\0\x40\x8a\x08\0\0\0\0\0\0\0\x40\x86", "too large"),
        (b"K\x03K\x01\x86", b"K\x01\x85", "size and stride"),
        (b"cpuq\x06K\x06", b"cpuq\x06K\x07", "storage 0 is truncated; expected 28 bytes, found 24 bytes"),
        (b"cpuq\x06K\x06", b"cpuq\x06K\x05", "storage 0 has more bytes than elements; expected 20 bytes"),
        (b"cpuq\x06K\x06", b"cpuq\x06J\xff\xff\xff\xff", "elements"),
        (b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x007q", "storage 7 is missing"),
    ],
)
def test_27_tensors_that_do_not_fit_their_storage(
    small: str, tmp_path: Path, old: bytes, new: bytes, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_torch(pickled(small, tmp_path / "x.bin", old, new))
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["ComplexFloatStorage", "QInt8Storage"])
def test_element_types_numpy_lacks(small: str, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsupportedError, match=kind):
        read_torch(pickled(small, tmp_path / "x.bin", b"FloatStorage", kind.encode()))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Valid files to damage."""
    directory = tmp_path_factory.mktemp("material")
    values = {
        name: tensor for name, tensor in varied().items() if name in ("float32", "uint16", "transposed", "column")
    }
    return {layout: Path(save(directory / layout, values, layout)).read_bytes() for layout in LAYOUTS}


@settings(max_examples=150, deadline=None)
@given(layout=st.sampled_from(sorted(LAYOUTS)), pickle_only=st.booleans(), data=st.data())
def test_damage_gives_an_error_or_tensors_inside_the_file(
    material: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, layout: str, pickle_only: bool, data: Any
) -> None:
    """Any damage gives a GptConvertError, or tensors that can be read without leaving the file."""
    content = material[layout]
    if layout == "zip" and pickle_only:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        key = "zip/data.pkl"
        members[key] = damaged(members[key], data)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, member in members.items():
                archive.writestr(name, member)
        content = buffer.getvalue()
    else:
        content = damaged(content, data)
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(content)
    try:
        tensors = read_torch(path)
        for tensor in tensors.values():
            if tensor.nbytes < 1 << 20:
                tensor.read()
    except GptConvertError as error:
        str(error)


def damaged(content: bytes, data: Any) -> bytes:
    """``content`` with a few bytes changed, added or removed, mostly near the start or the end."""
    for _ in range(data.draw(st.integers(1, 4))):
        near = min(len(content), 1200)
        at = (
            data.draw(st.integers(0, near))
            if data.draw(st.booleans())
            else len(content) - data.draw(st.integers(0, near))
        )
        content = content[:at] + data.draw(st.binary(max_size=3)) + content[at + data.draw(st.integers(0, 3)) :]
    return content
