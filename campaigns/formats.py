"""The formats of the differential campaign: random files, our reader, and the official library's.

Both readers return their values in one form: name → what to compare.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from campaigns.mutations import Mutation, damaged, index_row, json_value, safetensors_header, zip_member
from campaigns.parsers import CORPUS
from gptconvert.containers import json as strict_json
from gptconvert.containers import msgpack, npy, safetensors, tf_bundle, yaml
from gptconvert.containers.crc import crc32c
from gptconvert.containers.hdf5 import is_dataset, lazy_tensor, open_hdf5
from gptconvert.containers.torch import read_torch_pickle
from gptconvert.containers.zip import read_members
from gptconvert.errors import InputError
from gptconvert.model.dtypes import ELEMENT_TYPES
from gptconvert.model.tensors import FileChecksum, LazyTensor, Stored

#: Name → a value or (dtype, shape, bytes) of an array.
Values = Mapping[str, object]
Files = dict[str, bytes]
#: Largest array that a reader may state, in bytes: others are not compared.
MAX_READ = 1 << 22


@dataclass(frozen=True)
class Format:
    """How to make and read files of a format.

    Attributes:
        make: random valid files.
        path: the file, or the prefix of files, that both readers open.
        ours: our reader.
        official: the official library's.
        mutation: damages a file and repairs lengths and checksums.
        needs: the package without which it is not run.
        accepted: whether we accept the files that ``make`` returns.
    """

    make: Callable[[random.Random], Files]
    path: str
    ours: Callable[[str], Values]
    official: Callable[[str], Values]
    mutation: Mutation = damaged
    needs: str | None = None
    accepted: bool = True


def array(value: Any) -> object:
    """An array in the form to compare: without its byte order."""
    value = np.asarray(value)
    native = value.astype(value.dtype.newbyteorder("="), copy=False)
    return str(native.dtype), native.shape, np.ascontiguousarray(native).tobytes()


def lazy(tensor: LazyTensor) -> object:
    """A lazy tensor in the form to compare."""
    if tensor.nbytes > MAX_READ:
        raise InputError("too large to compare", path="")
    return array(tensor.read())


def checked(checksums: Iterable[FileChecksum]) -> None:
    """Verify recorded checksums, as a conversion does."""
    for each in checksums:
        segment = each.segment
        with open(segment.path, "rb") as file:
            file.seek(segment.offset)
            data = file.read(segment.nbytes)
        if {"crc32": zlib.crc32, "crc32c": crc32c}[each.algorithm](data) != each.value:
            raise InputError("wrong checksum", path=segment.path, item=each.what)


def arrays(dice: random.Random, names: Iterable[str], types: str) -> dict[str, Any]:
    """Random arrays of odd shapes, scalar and empty ones included."""
    made = {}
    for name in names:
        shape = dice.choice(((), (0,), (3,), (2, 3), (3, 1, 2), (0, 4)))
        raw = np.frombuffer(dice.randbytes(max(1, int(np.prod(shape)))), np.uint8)
        made[name] = raw[: int(np.prod(shape))].reshape(shape).astype(dice.choice(types.split()))
    return made


def names(dice: random.Random) -> list[str]:
    """Names of tensors."""
    return dice.sample(["a", "wte.weight", "h.0.ln_1.bias", "model/h0/attn/w", "b c", "é"], dice.randint(1, 4))


PLAIN = (bool, int, float, str, bytes, list, dict)
NUMPY = "float64 float32 float16 int64 int32 int16 int8 uint8 bool"

# --- safetensors ----------------------------------------------------------------------------------------------------


def make_safetensors(dice: random.Random) -> Files:
    import safetensors.numpy as official

    metadata = {"format": "pt"} if dice.random() < 0.5 else None
    return {"m": official.save(arrays(dice, names(dice), NUMPY), metadata)}


def read_safetensors(path: str) -> Values:
    return {name: lazy(tensor) for name, tensor in safetensors.read_safetensors(path).items()}


def official_safetensors(path: str) -> Values:
    import safetensors as official

    types = {row.safetensors: row.dtype for row in ELEMENT_TYPES if row.safetensors}
    found = official.deserialize(Path(path).read_bytes())
    known = {name: info for name, info in found if info["dtype"] in types}  # ours refuses the others
    return {
        name: array(np.frombuffer(bytes(info["data"]), types[info["dtype"]]).reshape(info["shape"]))
        for name, info in known.items()
    }


# --- NumPy, zip -----------------------------------------------------------------------------------------------------


def make_npy(dice: random.Random) -> Files:
    value = next(iter(arrays(dice, "a", f"{NUMPY} >f4 >i8 <u2").values()))
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asfortranarray(value) if dice.random() < 0.5 else value)
    return {"a.npy": out.getvalue()}


def official_npy(path: str) -> Values:
    with open(path, "rb") as file:
        value = {"": array(np.lib.format.read_array(file, allow_pickle=False, max_header_size=10**9))}
        if file.read(1):
            raise ValueError("bytes follow the array")
    return value


def make_zip(dice: random.Random) -> Files:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names(dice):
            archive.writestr(zipfile.ZipInfo(name), dice.randbytes(dice.choice((0, 5, 300))))
    return {"a.zip": out.getvalue()}


def read_zip(path: str) -> Values:
    members = read_members(path).values()
    checked(FileChecksum(member.data, "crc32", member.crc32, member.name) for member in members)
    data = Path(path).read_bytes()
    return {member.name: data[member.data.offset : member.data.end] for member in members}


def official_zip(path: str) -> Values:
    with zipfile.ZipFile(path) as archive:
        return {info.orig_filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}


# --- PyTorch --------------------------------------------------------------------------------------------------------


def make_torch(dice: random.Random) -> Files:
    import torch

    values: dict[str, Any] = {n: torch.from_numpy(a) for n, a in arrays(dice, names(dice), NUMPY).items()}
    first = next(iter(values.values()))
    more = {"view": first.T if first.ndim == 2 else first[None], "shared": first, "half": first.bfloat16()}
    values |= dict(dice.sample(sorted(more.items()), dice.randint(0, 3)))
    values |= {"step": 7, "rate": 1e-4, "nested": {"list": [1, "a", None, first]}} if dice.random() < 0.5 else {}
    out = io.BytesIO()
    torch.save(values, out, _use_new_zipfile_serialization=dice.random() < 0.6)
    return {"m.bin": out.getvalue()}


def torch_member(dice: random.Random, data: bytes) -> bytes:
    """An archive with damage where values are: torch.load also checks records like the version."""
    return zip_member(dice, data, r"\.pkl$|/data/\d+$")


def flattened(tree: object, leaf: Callable[[Any], object], name: str = "") -> dict[str, object]:
    """The leaves of nested dictionaries, lists and tuples."""
    if isinstance(tree, Mapping):
        pairs: Iterable[tuple[object, object]] = tree.items()
    elif isinstance(tree, (list, tuple)):
        pairs = enumerate(tree)
    else:
        return {name: leaf(tree)}
    return {key: value for at, item in pairs for key, value in flattened(item, leaf, f"{name}/{at!r}").items()}


def read_torch(path: str) -> Values:
    file = read_torch_pickle(path)
    checked(file.checksums)
    return flattened(file.tree, lambda leaf: lazy(leaf) if isinstance(leaf, LazyTensor) else plain(leaf))


def official_torch(path: str) -> Values:
    import ml_dtypes
    import torch

    def leaf(value: Any) -> object:
        if not isinstance(value, torch.Tensor):
            return plain(value)
        value = value.detach()
        if value.dtype == torch.bfloat16:
            return array(value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        return array(value.numpy())

    return flattened(torch.load(path, weights_only=True, map_location="cpu"), leaf)


def plain(value: object) -> object:
    """A value with its type, so that 1, 1.0 and True differ and NaN equals itself; of another class, only that."""
    return (type(value).__name__, repr(value)) if value is None or isinstance(value, PLAIN) else "an object"


@functools.cache
def tensorflow() -> Any:
    """The package, imported without its messages, which it writes past Python."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import tensorflow

        tensorflow.constant(0)
        return tensorflow
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


# --- TensorFlow -----------------------------------------------------------------------------------------------------


def make_bundle(dice: random.Random) -> Files:
    tf = tensorflow()
    values = arrays(dice, names(dice), NUMPY)
    with tempfile.TemporaryDirectory() as folder:
        tf.raw_ops.SaveV2(
            prefix=f"{folder}/m",
            tensor_names=list(values),
            shape_and_slices=[""] * len(values),
            tensors=[tf.constant(value) for value in values.values()],
        )
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def read_bundle(path: str) -> Values:
    tensors = tf_bundle.read_bundle(path)
    whole = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Stored) and tensor.parts}
    checked(tensors.checksums)
    checked(FileChecksum(t.parts[0], "crc32c", t.crc32c, name) for name, t in whole.items() if t.crc32c is not None)
    return {name: lazy(tensor) for name, tensor in tensors.items()}


def official_bundle(path: str) -> Values:
    tf = tensorflow()

    reader = tf.train.load_checkpoint(path)
    types = reader.get_variable_to_dtype_map()
    numeric = [name for name, dtype in types.items() if dtype not in (tf.string, tf.resource, tf.variant)]
    return {name: array(reader.get_tensor(name)) for name in numeric}


# --- HDF5, MessagePack ----------------------------------------------------------------------------------------------


def make_hdf5(dice: random.Random) -> Files:
    import h5py

    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        for name, value in arrays(dice, names(dice), "float64 float32 float16 >f4").items():
            chunked = dice.random() < 0.5 and value.ndim > 0 and value.size > 0
            file.create_dataset(name, data=value, **({"chunks": True, "compression": "gzip"} if chunked else {}))
    return {"m.h5": out.getvalue()}


def _datasets(file: Any, read: Callable[[Any], object]) -> Values:
    found: dict[str, Any] = {}
    file.visititems(lambda name, node: found.update({name: node}) if is_dataset(node) else None)
    return {name: read(node) for name, node in found.items()}


def read_hdf5(path: str) -> Values:
    with open_hdf5(path) as file:
        return _datasets(file, lambda dataset: lazy(lazy_tensor(dataset, path)))


def official_hdf5(path: str) -> Values:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        return _datasets(file, lambda dataset: array(dataset[()]))


def make_msgpack(dice: random.Random) -> Files:
    import msgpack as official

    def pack(value: Any) -> Any:
        raw = official.packb((value.shape, value.dtype.name, value.tobytes()))
        return official.ExtType(3 if value.ndim == 0 and dice.random() < 0.5 else 1, raw)

    values: dict[str, Any] = {name: pack(value) for name, value in arrays(dice, names(dice), NUMPY).items()}
    extra = {
        "n": dice.choice((1, -1, 300, -70_000, 2**40)),
        "x": 0.5,
        "s": "text",
        "b": b"123",
        "l": [None, True, {}],
    }
    values |= dict(dice.sample(sorted(extra.items()), dice.randint(0, 4)))
    return {"m.msgpack": official.packb({"params": values})}


def read_msgpack(path: str) -> Values:
    return flattened(
        msgpack.read_msgpack(path), lambda leaf: lazy(leaf) if isinstance(leaf, LazyTensor) else plain(leaf)
    )


def official_msgpack(path: str) -> Values:
    import msgpack as official

    def extension(code: int, data: bytes) -> object:
        shape, dtype, raw = official.unpackb(data, raw=True)
        return np.frombuffer(raw, _dtype(dtype.decode() if isinstance(dtype, bytes) else dtype)).reshape(shape)

    def leaf(value: object) -> object:
        if isinstance(value, np.ndarray):
            return array(value)
        return plain(len(value) if isinstance(value, bytes) else value)  # ours keeps the length of byte strings

    tree = official.unpackb(Path(path).read_bytes(), ext_hook=extension, strict_map_key=False)
    return flattened(tree, leaf)


def _dtype(name: str) -> Any:
    return next((row.dtype for row in ELEMENT_TYPES if row.torch == name), None) or np.dtype(name)


# --- text -----------------------------------------------------------------------------------------------------------


def random_value(dice: random.Random, depth: int = 0) -> object:
    """Nested plain data."""
    if depth < 3 and dice.random() < 0.6:
        inner = [random_value(dice, depth + 1) for _ in range(dice.randint(0, 4))]
        return inner if dice.random() < 0.4 else {f"k{i}": value for i, value in enumerate(inner)}
    return dice.choice(
        (None, True, 0, -1, 10**17, 0.5, 1e-5, -2.5e300, "", "text", "é", "1", "no", "1e5", "2001-01-01")
    )


def make_json(dice: random.Random) -> Files:
    return {"x.json": json.dumps(random_value(dice), indent=dice.choice((None, 2))).encode()}


def official_json(path: str) -> Values:
    def integer(text: str) -> float:
        value = int(text)
        return float(text) if text == "-0" or not -(2**63) <= value < 2**64 else value  # as ours, by design

    return {"": plain(json.loads(Path(path).read_bytes(), parse_int=integer))}


def make_yaml(dice: random.Random) -> Files:
    import yaml as official

    text: str = official.safe_dump(random_value(dice), default_flow_style=dice.choice((None, True, False)))
    return {"x.yml": text.encode()}


def official_yaml(path: str) -> Values:
    import yaml as official

    # libyaml's scanner, as ours: Python's refuses tabs that the specification allows.
    loader = getattr(official, "CSafeLoader", official.SafeLoader)
    value = official.load(Path(path).read_bytes().decode("utf-8", "replace"), loader)
    return {"": plain(with_floats(value))}


def with_floats(value: Any) -> object:
    """Plain data with integers beyond 64 bits as floats, as in our readers, by design."""
    if isinstance(value, dict):
        return {with_floats(key): with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_floats(item) for item in value]
    return float(value) if type(value) is int and abs(value) >= 2**64 else value


# --- SavedModel -----------------------------------------------------------------------------------------------------


def make_saved_model(dice: random.Random) -> Files:
    """One of the fuzzing corpus: TensorFlow's own would take a second each."""
    return {"saved_model.pb": dice.choice(sorted((CORPUS / "saved_model").iterdir())).read_bytes()}


def check_saved_model(path: str) -> Values:
    """Nothing, if the model passes."""
    from gptconvert.targets.saved_model.safety import check_saved_model

    check_saved_model(str(Path(path).parent))
    return {}


def official_saved_model(path: str) -> Values:
    """The operators that TensorFlow's parser finds anywhere and our check should have refused."""
    tensorflow()
    from tensorflow.core.protobuf import saved_model_pb2

    from gptconvert.targets.saved_model.operators import ALLOWED, CHECKPOINTS

    found = saved_model_pb2.SavedModel.FromString(Path(path).read_bytes())
    graphs = [meta.graph_def for meta in found.meta_graphs]
    functions = [function for graph in graphs for function in graph.library.function]
    nodes = [*(n for graph in graphs for n in graph.node), *(n for f in functions for n in f.node_def)]
    known = {*ALLOWED, *CHECKPOINTS, *(function.signature.name for function in functions)}
    return {f"operator {node.op} of {node.name}": True for node in nodes if node.op not in known}


FORMATS: Mapping[str, Format] = {
    "hdf5": Format(make_hdf5, "m.h5", read_hdf5, official_hdf5, needs="h5py"),
    "json": Format(
        make_json,
        "x.json",
        lambda path: {"": plain(strict_json.parse_json(Path(path).read_bytes(), path, "x"))},
        official_json,
        json_value,
    ),
    "msgpack": Format(make_msgpack, "m.msgpack", read_msgpack, official_msgpack, needs="msgpack"),
    "npy": Format(make_npy, "a.npy", lambda path: {"": lazy(npy.read_npy(path))}, official_npy),
    "safetensors": Format(make_safetensors, "m", read_safetensors, official_safetensors, safetensors_header),
    "saved_model": Format(
        make_saved_model,
        "saved_model.pb",
        check_saved_model,
        official_saved_model,
        needs="tensorflow",
        accepted=False,
    ),
    "tensorflow": Format(make_bundle, "m", read_bundle, official_bundle, index_row, needs="tensorflow"),
    "torch": Format(make_torch, "m.bin", read_torch, official_torch, torch_member),
    "yaml": Format(
        make_yaml,
        "x.yml",
        lambda path: {"": plain(yaml.parse_yaml(Path(path).read_bytes().decode("utf-8", "replace"), path))},
        official_yaml,
    ),
    "zip": Format(make_zip, "a.zip", read_zip, official_zip),
}
