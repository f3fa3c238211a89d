"""The parsers of untrusted bytes: how to call each, valid inputs, and mutations that know the format."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from campaigns.mutations import Mutation, damaged, index_row, json_value, safetensors_header, zip_member
from gptconvert.containers import gguf, msgpack, npy, safetensors, snappy, tf_index, tflite, yaml
from gptconvert.containers import json as strict_json
from gptconvert.containers.hdf5 import is_dataset, lazy_tensor, open_hdf5
from gptconvert.containers.leveldb import read_table
from gptconvert.containers.pickle import load_pickle
from gptconvert.containers.protobuf import MalformedError, Message, bytes_field, integer_field
from gptconvert.containers.torch import read_torch
from gptconvert.containers.torch_objects import torch_rules
from gptconvert.containers.zip import read_members
from gptconvert.inspection import open_checkpoint
from gptconvert.model.options import Options
from gptconvert.model.tensors import LazyTensor, Segment
from gptconvert.sources.documents import read_card
from gptconvert.sources.hf.shards import read_weight_map
from gptconvert.sources.hub_listing import parse_listing
from gptconvert.sources.llmc import open_llmc
from gptconvert.sources.tf_locate import locate
from gptconvert.targets.package.tokenizer import parse_merges, parse_vocabulary, tokenizer_files

FIXTURES = Path(__file__).parents[1] / "fixtures"
#: PARSER/ holds the inputs that the fuzzing campaign starts from.
CORPUS = Path(__file__).parent / "corpus"
#: Largest tensor that is read, in bytes.
MAX_READ = 1 << 20

#: (input, an empty directory that it may write to) → anything.
Parse = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Parser:
    """A parser of untrusted bytes.

    Attributes:
        parse: reads an input.
        seeds: valid inputs, from which ``python -m campaigns.fuzz --minimise`` starts.
        mutation: changes an input and repairs lengths and checksums.
        refusals: exceptions that its callers turn into ours.
        needs: the package without which it is not run.
    """

    parse: Parse
    seeds: Callable[[], Iterable[bytes]]
    mutation: Mutation = damaged
    refusals: tuple[type[Exception], ...] = ()
    needs: str | None = None


def fixtures(*patterns: str, largest: int = 1 << 16) -> Callable[[], Iterable[bytes]]:
    """The small fixtures that match."""
    return lambda: [
        path.read_bytes()
        for pattern in patterns
        for path in sorted(FIXTURES.glob(pattern))
        if path.stat().st_size <= largest
    ]


def at(name: str, read: Callable[[str], object]) -> Parse:
    """A parser of a file of this name."""

    def parse(data: bytes, folder: Path) -> object:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return read(str(path))

    return parse


def read_all(tensors: Iterable[LazyTensor]) -> None:
    """Read the small tensors."""
    for tensor in tensors:
        if tensor.nbytes <= MAX_READ:
            tensor.read()


# --- one function per parser that needs more than a call ------------------------------------------------------------


def pickled(data: bytes, folder: Path) -> object:
    """A pickle, with any storage it names."""
    rules = torch_rules("data.pkl", lambda key, elements, item: Segment("data.pkl", 0, elements * item))
    return load_pickle(io.BytesIO(data), rules, "data.pkl")


def pickles() -> Iterable[bytes]:
    """The pickles in PyTorch's files."""
    for data in fixtures("tiny-gpt2/hf-bin*/*.bin", "originals/*/**/*.pt")():
        if data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                yield from (archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))


def hdf5(path: str) -> None:
    """Every dataset of an HDF5 file."""
    with open_hdf5(path) as file:
        found: list[Any] = []
        file.visititems(lambda name, node: found.append(node) if is_dataset(node) else None)
        read_all(lazy_tensor(dataset, path) for dataset in found)


def hdf5_files() -> Iterable[bytes]:
    """Contiguous, chunked and compressed datasets, and attributes."""
    import h5py
    import numpy as np

    for options in ({}, {"chunks": (2, 2)}, {"chunks": (3, 2), "compression": "gzip"}, {"dtype": ">f8"}):
        out = io.BytesIO()
        with h5py.File(out, "w") as file:
            given = {"dtype": "f4", **options}
            file.create_group("a/b").create_dataset("w", data=np.arange(12).reshape(3, 4), **given)
            file.attrs["layer_names"] = [b"a", b"c"]
        yield out.getvalue()


@functools.cache
def _checkpoint() -> Any:
    return open_checkpoint(FIXTURES / "tiny-gpt2/hf-safetensors")


def tokenizer(name: str) -> Callable[[str], object]:
    """A tokenizer file of a checkpoint."""

    def read(path: str) -> object:
        checkpoint = _checkpoint()
        return tokenizer_files(replace(checkpoint, source=replace(checkpoint.source, tokenizer={name: path})))

    return read


def tokenizers() -> Iterable[bytes]:
    """BPE with and without its optional parts, and other models."""
    for name in ("tiny-gpt2/hf-safetensors", "gpt2-stdlib"):
        files, _ = tokenizer_files(open_checkpoint(FIXTURES / name))
        if "tokenizer.json" in files:
            value = json.loads(files["tokenizer.json"])
            value["model"]["merges"] = value["model"]["merges"][:4]
            kept = {"".join(pair) for pair in value["model"]["merges"]}
            value["model"]["vocab"] = {
                token: number for token, number in value["model"]["vocab"].items() if len(token) == 1 or token in kept
            }
            yield json.dumps(value).encode()
    for kind in ("WordLevel", "WordPiece"):
        model: dict[str, object] = {"type": kind, "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
        model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 9} if kind == "WordPiece" else {}
        yield json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode()
    yield json.dumps({"version": "1.0", "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}}).encode()


def walked(data: bytes, folder: Path) -> None:
    """A protobuf message and everything in it that could be a message."""
    pending = [(Message(data), 0)]
    while pending:
        message, depth = pending.pop()
        for number in range(1, 17):
            if number in message and depth <= 4:
                pending += [(inner, depth + 1) for inner in message.messages(number)]


def messages() -> Iterable[bytes]:
    """Nested fields of every wire type."""
    yield integer_field(1, 300) + bytes_field(2, integer_field(1, 2**63)) + b"\x1d\0\0\x80\x3f" + b"\x21" + bytes(8)
    yield bytes_field(1, bytes_field(2, bytes_field(3, b""))) * 3


def saved_model(data: bytes, folder: Path) -> object:
    """The safety check of a SavedModel."""
    from gptconvert.targets.saved_model.safety import check_saved_model

    return at("saved_model.pb", lambda _: check_saved_model(str(folder)))(data, folder)


def saved_models() -> Iterable[bytes]:
    """Small programs that TensorFlow saves: a function that calls another, and a loop, which is refused."""
    import tensorflow as tf

    signature = [tf.TensorSpec((None,), tf.float32, "x")]
    inner = tf.function(lambda x: x * 2, input_signature=signature, autograph=False)
    bodies = (lambda x: inner(x) + 1, lambda x: tf.while_loop(lambda i: i < 9.0, lambda i: (i + 1,), (x[0],))[0] + x)
    for body in bodies:
        root = tf.Module()
        root.weight = tf.Variable([1.0, 2.0])
        root.f = tf.function(body, input_signature=signature, autograph=False)
        with tempfile.TemporaryDirectory() as folder:
            tf.saved_model.save(root, folder, signatures={"f": root.f})
            yield (Path(folder) / "saved_model.pb").read_bytes()


def onnx_model(path: str) -> object:
    """The safety check of an ONNX model, and its initializers."""
    from gptconvert.targets.onnx.file import open_onnx

    return read_all(open_onnx(path).initializers.values())


def gguf_files() -> Iterable[bytes]:
    """A head with values of every kind, plain and quantised tensors."""
    metadata: dict[str, Any] = {"general.architecture": "gpt2", "a": 7, "b": 0.5, "c": True}
    metadata |= {"t": ["x", "ü"], "n": [1, -2], "f": [0.5], "e": [], "s": (gguf.UINT16, 3)}
    entries = [("one", gguf.TYPES["F32"], (2, 3), 0), ("two", gguf.TYPES["Q4_0"], (1, 32), 32)]
    yield gguf.head_bytes(metadata, entries) + bytes(64)
    yield gguf.head_bytes({}, [])


def lite_models() -> Iterable[bytes]:
    """A graph with a plain and a quantised constant, an operator and a signature."""
    import flatbuffers
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    model, graph, signature = schema.ModelT(), schema.SubGraphT(), schema.SignatureDefT()
    model.version, model.subgraphs, model.signatureDefs = 3, [graph], [signature]
    model.buffers, model.operatorCodes = [schema.BufferT() for _ in range(3)], [schema.OperatorCodeT()]
    model.buffers[1].data, model.buffers[2].data = np.arange(8, dtype=np.uint8), np.arange(2, dtype=np.uint8)
    graph.tensors, graph.operators = [schema.TensorT() for _ in range(3)], [schema.OperatorT()]
    for number, (tensor, kind) in enumerate(zip(graph.tensors, (0, 0, 9), strict=True)):
        tensor.name, tensor.type, tensor.buffer, tensor.shape = f"t{number}", kind, number, np.array([2], np.int32)
    graph.tensors[0].shapeSignature = np.array([-1], np.int32)
    graph.tensors[2].quantization = schema.QuantizationParametersT()
    graph.tensors[2].quantization.scale = np.array([1, 2], np.float32)
    graph.tensors[2].quantization.zeroPoint = np.zeros(2, np.int64)
    signature.signatureKey, signature.inputs = "decode", [schema.TensorMapT()]
    signature.inputs[0].name, signature.inputs[0].tensorIndex = "x", 0
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    yield bytes(builder.Output())


def lite_model(path: str) -> object:
    """The safety check of a LiteRT model, and its constants."""
    from gptconvert.targets.tflite.safety import check_model

    model = tflite.read_tflite(path)
    check_model(model)
    tensors = [tensor for graph in model.graphs for tensor in graph.tensors]
    return read_all(t for tensor in tensors for t in (tensor.stored, tensor.scales, tensor.zeros) if t is not None)


def onnx_models() -> Iterable[bytes]:
    """A branch, a function, and weights in every form."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    def branch(name: str) -> Any:
        return helper.make_graph([helper.make_node("Identity", ["w"], [name])], name, [], [_value(name)])

    def _value(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"])

    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=branch("t"), else_branch=branch("e")),
        helper.make_node("Twice", ["y"], ["z"], domain="local"),
    ]
    weights = [
        numpy_helper.from_array(np.float32([1, 2]), "w"),
        helper.make_tensor("v", TensorProto.FLOAT, [2], [1.0, 2.0]),
        numpy_helper.from_array(np.array(True), "c"),
    ]
    add = [helper.make_node("Add", ["a", "a"], ["b"])]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "Twice", ["a"], ["b"], add, imports[:1])
    graph = helper.make_graph(nodes, "g", [_value("x")], [_value("z")], weights)
    yield helper.make_model(graph, functions=[function], opset_imports=imports).SerializeToString()
    external = weights[0]
    external.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "data"), ("offset", "0"), ("length", "8")):
        external.external_data.add(key=key, value=value)
    graph = helper.make_graph(nodes[:1], "g", [_value("x")], [_value("y")], [external, *weights[1:]])
    yield helper.make_model(graph, opset_imports=imports[:1]).SerializeToString()


def listings() -> Iterable[bytes]:
    """A hub's reply."""
    digest = {"rfilename": "model.safetensors", "size": 9, "blobId": "b" * 40, "lfs": {"sha256": "c" * 64, "size": 9}}
    siblings = [{"rfilename": "config.json", "size": 2, "blobId": "a" * 40}, digest, {"rfilename": "onnx/a.json"}]
    yield json.dumps({"id": "a/b", "sha": "0" * 40, "siblings": siblings}).encode()


def snappy_blocks() -> Iterable[bytes]:
    """Literals, and copies of each length of offset."""
    yield b"\x05\x10abcde"
    yield b"\x14\x0cabcd\x01\x04\x12\x04\x00\x13\x04\0\0\0\x04xy"


def tables() -> Iterable[bytes]:
    """The indexes of TensorFlow's checkpoints."""
    return fixtures("**/*.index")()


def state(data: bytes, folder: Path) -> object:
    """The file that names TensorFlow's newest checkpoint, beside one."""
    (folder / "model.ckpt.index").touch()
    return at("checkpoint", lambda _: locate(str(folder)))(data, folder)


def _texts(*texts: str) -> Callable[[], Iterable[bytes]]:
    return lambda: [text.encode() for text in texts]


YAML = "a: 1\nb-c: [1.5, 2e-5, 0x1F, 1_000, 1:30, .inf, ~]\nd: {e: yes, 'f': \"g\\n\"}\nh: |\n  text\ni: 2001-01-01\n"
CARD = "---\nlicense: mit\nlanguage:\n- en\ntags: [a, b]\ndatasets: x\n---\n# Model\n"
STATE = 'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt-\\0621"\n'

PARSERS: Mapping[str, Parser] = {
    "card": Parser(at("README.md", read_card), _texts(CARD)),
    "gguf": Parser(
        at("m.gguf", lambda path: read_all(t.stored for t in gguf.read_gguf(path).tensors.values())), gguf_files
    ),
    "hdf5": Parser(at("tf_model.h5", hdf5), hdf5_files, needs="h5py"),
    "json": Parser(
        lambda data, _: strict_json.parse_json(data, "x.json", "x"), fixtures("*/*/config.json"), json_value
    ),
    "leveldb": Parser(lambda data, _: list(read_table(data)), tables, index_row, (MalformedError,)),
    "listing": Parser(lambda data, _: parse_listing(data, "http://hub"), listings, json_value),
    "llmc": Parser(at("gpt2.bin", lambda path: open_llmc(path, Options())), fixtures("originals/llmc/*.bin")),
    "merges": Parser(lambda data, _: parse_merges(data, "merges.txt"), fixtures("gpt2-stdlib/vocab.bpe")),
    "msgpack": Parser(at("flax_model.msgpack", msgpack.read_msgpack), fixtures("originals/flax*/*.msgpack")),
    "npy": Parser(
        at("a.npy", lambda path: npy.read_npy(path).read()), fixtures("originals/gpt1/*.npy", largest=8000)
    ),
    "onnx": Parser(at("model.onnx", onnx_model), onnx_models),
    "pickle": Parser(pickled, pickles),
    "protobuf": Parser(walked, messages, refusals=(MalformedError,)),
    "safetensors": Parser(
        at("m.safetensors", lambda path: read_all(safetensors.read_safetensors(path).values())),
        fixtures("tiny-gpt2/hf-safetensors-sharded/*.safetensors", largest=20_000),
        safetensors_header,
    ),
    "saved_model": Parser(saved_model, saved_models),
    "shards": Parser(at("x.index.json", read_weight_map), fixtures("tiny-gpt2/*/*.index.json"), json_value),
    "snappy": Parser(lambda data, _: snappy.decompress(data), snappy_blocks, refusals=(MalformedError,)),
    "state": Parser(state, _texts(STATE)),
    "tf_index": Parser(at("m.index", lambda path: tf_index.read_index(path[:-6])), tables, index_row),
    "tflite": Parser(at("model.tflite", lite_model), lite_models, needs="ai_edge_litert"),
    "tokenizer": Parser(at("tokenizer.json", tokenizer("tokenizer.json")), tokenizers, json_value),
    "torch": Parser(
        at("m.bin", lambda path: read_all(read_torch(path).values())),
        fixtures("originals/neox-pipeline/*/*.pt", largest=4000),
        zip_member,
    ),
    "vocabulary": Parser(lambda data, _: parse_vocabulary(data, "v.json"), _texts('{"a": 0, "b": 1}'), json_value),
    "yaml": Parser(lambda data, _: yaml.parse_yaml(data.decode("utf-8", "replace"), "x.yml"), _texts(YAML)),
    "zip": Parser(at("a.zip", read_members), fixtures("originals/mesh-jax/*/*/1.npz")),
}
