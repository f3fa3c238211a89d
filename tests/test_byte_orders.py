"""Big-endian checkpoints: every reader of a format that allows them, converted and verified to every target.

A big-endian checkpoint must give the same bytes as the little-endian one that holds the same values.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from campaigns.correct import close_tensorflow, one_tensorflow
from gptconvert.containers.tf_bundle import read_bundle
from tests.commands import command, tree
from tests.containers import bundle_bytes
from tests.containers.torch_files import rewrite
from tests.helpers import FIXTURES, Arrays

#: (a copy of the fixture, swap?) → whether its files are now big-endian, if swap, or else little-endian.
Write = Callable[[Path, bool], None]
#: Files that name the source or its digests.
ABOUT_THE_SOURCE = ("README.md", "manifest.json", "SHA256SUMS")


@dataclass(frozen=True)
class Case:
    """A fixture, how to rewrite it, the options that open it, and the targets of its family."""

    fixture: str
    write: Write
    options: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("onnx", "safetensors", "openai-tf")


def swapped(data: bytes, size: int) -> bytes:
    return np.frombuffer(data, np.uint8).reshape(-1, size)[:, ::-1].tobytes()


def torch_file(name: str, dtype: str) -> Write:
    def write(folder: Path, swap: bool) -> None:
        import torch

        path = folder / name
        state = torch.load(path, weights_only=True)
        kind = getattr(torch, dtype)
        torch.save({key: tensor.to(kind) for key, tensor in state.items() if tensor.is_floating_point()}, path)

        def change(member: str, data: bytes) -> bytes:
            if member.endswith("/byteorder"):
                return b"big"
            return swapped(data, kind.itemsize) if "/data/" in member else data

        if swap:
            rewrite(str(path), folder / "swapped", change)
            (folder / "swapped").replace(path)

    return write


def npy_files(folder: Path, swap: bool) -> None:
    for path in folder.glob("params_*.npy"):
        np.save(path, np.load(path).astype(">f4" if swap else "<f4"))


def npz_files(folder: Path, swap: bool) -> None:
    for path in folder.rglob("*.npz"):
        if path.name != "golden.npz":
            arrays = dict(np.load(path))
            orders = {key: a.astype(a.dtype.newbyteorder(">")) if swap else a for key, a in arrays.items()}
            np.savez(path, **orders)


def hdf5_file(chunks: bool) -> Write:
    def write(folder: Path, swap: bool) -> None:
        import h5py

        with h5py.File(folder / "tf_model.h5", "r+") as file:
            names: list[str] = []
            file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
            for name in names:
                values = file[name][()]
                del file[name]
                kind = ">f4" if swap else "<f4"
                file.create_dataset(name, data=values.astype(kind), chunks=True if chunks and values.ndim else None)

    return write


def bundle(prefix: str) -> Write:
    def write(folder: Path, swap: bool) -> None:
        arrays: Arrays = {name: tensor.read() for name, tensor in read_bundle(str(folder / prefix)).items()}
        for path in folder.glob(f"{prefix}.data-*"):
            path.unlink()
        rows, data = [(b"", bundle_bytes.header(endianness=int(swap)))], b""
        for name in sorted(arrays):
            raw = arrays[name].tobytes()
            raw = swapped(raw, arrays[name].dtype.itemsize) if swap else raw
            kind, where = bundle_bytes.ENUM[arrays[name].dtype.name], {"offset": len(data), "size": len(raw)}
            entry = bundle_bytes.entry(kind, arrays[name].shape, crc=bundle_bytes.masked(raw), **where)
            rows.append((name.encode(), entry))
            data += raw
        bundle_bytes.write_rows(folder / prefix, rows, data)

    return write


CASES: Mapping[str, Case] = {
    "torch float32": Case("tiny-gpt2/hf-bin", torch_file("pytorch_model.bin", "float32")),
    "torch float16": Case("tiny-gpt2/hf-bin", torch_file("pytorch_model.bin", "float16")),
    "torch bfloat16": Case("tiny-gpt2/hf-bin", torch_file("pytorch_model.bin", "bfloat16")),
    "npy": Case("originals/gpt1", npy_files, ("--n-head", "3")),
    "npz": Case("originals/mesh-jax", npz_files, targets=("onnx", "safetensors")),
    "h5": Case("originals/h5-gpt2", hdf5_file(chunks=False)),
    "h5 chunked": Case("originals/h5-gpt2", hdf5_file(chunks=True)),
    "bundle float32": Case("tiny-gpt2/openai-tf", bundle("model.ckpt")),
    "bundle bfloat16": Case("tiny-gpt2/openai-tf-bf16", bundle("model.ckpt")),
    "bundle of GPT-Neo": Case("originals/mesh-tf", bundle("model.ckpt"), targets=("onnx", "safetensors")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_target_is_verified_and_has_the_same_bytes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    little, big = (converted(case, case.targets, swap, tmp_path, capsys) for swap in (False, True))
    assert little == big


@pytest.fixture(scope="module")
def tensorflow() -> Iterator[None]:
    """One TensorFlow for all cases, since starting it takes seconds."""
    with one_tensorflow():
        yield
    close_tensorflow()


@pytest.mark.slow
@pytest.mark.tensorflow
def test_a_saved_model_is_verified(tensorflow: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights have the same bytes too; TensorFlow numbers the functions of its graph anew each time."""
    little, big = (converted(CASES["torch float16"], ("tf",), swap, tmp_path, capsys) for swap in (False, True))
    (weights,) = (path for path in little if path.endswith("data-00000-of-00002"))
    assert little[weights] == big[weights]


def converted(
    case: Case, targets: tuple[str, ...], swap: bool, root: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, bytes]:
    """Convert a checkpoint, verified: relative path → content of the output."""
    source, output = root / f"in{swap:d}" / "model", root / f"out{swap:d}"
    shutil.copytree(FIXTURES / case.fixture, source)
    case.write(source, swap)
    to = [word for target in targets for word in ("--to", target)]
    done = command(capsys, "convert", source, *case.options, *to, "-o", output)
    assert done.code == 0, done.err
    return {path: data for path, data in tree(output).items() if path not in ABOUT_THE_SOURCE}
