"""Files made to cost much more than their size: each is opened within a budget of processor time and memory.

Every case once took time or memory out of proportion. Its size is a parameter, so that a test opens a small one, and
the campaign one that is four times as large within four times the budget: what is quadratic exceeds it.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from campaigns.report import Case, Report
from gptconvert.containers.crc import crc32c, mask
from gptconvert.containers.gguf import ALIGNMENT, TYPES, head_bytes, read_gguf
from gptconvert.containers.leveldb import MAGIC, _block, write_table
from gptconvert.containers.protobuf import bytes_field, integer_field, varint
from gptconvert.errors import GptConvertError, UnforeseenError
from gptconvert.inspection import open_checkpoint
from gptconvert.targets.package.tokenizer import tokenizer_files

FIXTURES = Path(__file__).parents[1] / "fixtures"
#: Budget of a case of size 1: seconds of processor time, and MiB over the file's own size.
SECONDS, MEMORY = 1.5, 150.0
#: The size that the campaign runs.
LARGE = 4
#: Seconds after which the system stops a case.
LIMIT = 60
#: Multiples of this have the hash 0.
MODULUS = (1 << 61) - 1

#: (directory to write, size) → the path to open.
Make = Callable[[Path, int], Path]


@dataclass(frozen=True)
class Cost:
    """What opening a checkpoint took.

    Attributes:
        outcome: ``ok``, ``exit 3`` and the message, or an exception.
        seconds: processor time.
        memory: peak over the memory after the imports, in MiB; over the size of the files too.
    """

    outcome: str
    seconds: float
    memory: float


def run(seed: int, seconds: float, start: int = 0, only: int | None = None) -> Report:
    """Open every case at its large size until the time is over. The cases have no seed."""
    report, end = Report("hostile", seed, next=start), time.monotonic() + seconds
    for number, name in enumerate(CASES):
        if only is None and time.monotonic() >= end:
            break
        if number >= start and only in (None, number):
            cost = measure(name, LARGE)
            failed = cost.seconds > LARGE * SECONDS or cost.memory > LARGE * MEMORY or not is_allowed(cost.outcome)
            what = f"{name}: {cost.memory:.0f} MiB"
            report.add(Case(number, what, cost.outcome if failed else cost.outcome[:6], cost.seconds, failed))
    return report


def is_allowed(outcome: str) -> bool:
    """Whether a checkpoint may end so."""
    return outcome == "ok" or outcome.startswith(("exit 2", "exit 3", "exit 4", "exit 7"))


def measure(name: str, size: int) -> Cost:
    """Open a case in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as root:
        path = CASES[name](Path(root) / "model", size)
        nbytes = sum(file.stat().st_size for file in Path(root).rglob("*") if file.is_file())
        child = context.Process(target=_open, args=(path, there))
        child.start()
        there.close()
        try:
            outcome, seconds, memory = here.recv()
        except EOFError:
            outcome, seconds, memory = "killed at the limit", float(LIMIT), 0.0
        child.join()
    return Cost(outcome, seconds, memory - nbytes / 2**20)


def _open(path: Path, results: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    before, started = _memory(), time.process_time()
    try:
        tokenizer_files(open_checkpoint(path))
        outcome = "ok"
    except UnforeseenError as error:
        outcome = f"unforeseen: {error}"
    except GptConvertError as error:
        outcome = f"exit {error.exit_code}: {error}"[:300]
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"[:300]
    results.send((outcome, time.process_time() - started, _memory() - before))


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- files ----------------------------------------------------------------------------------------------------------


def copied(fixture: str, folder: Path) -> Path:
    """A copy of a fixture."""
    return Path(shutil.copytree(FIXTURES / fixture, folder))


def config(fixture: str = "tiny-gpt2/hf-safetensors", **changes: Callable[[int], object]) -> Make:
    """A checkpoint with values of config.json that depend on the size."""

    def make(folder: Path, size: int) -> Path:
        path = copied(fixture, folder) / "config.json"
        values = {key: value(size) for key, value in changes.items()}
        path.write_text(json.dumps({**json.loads(path.read_text()), **values.pop("_", {}), **values}))
        return folder

    return make


def file(fixture: str, name: str, content: Callable[[int], bytes]) -> Make:
    """A checkpoint with one file's content replaced."""

    def make(folder: Path, size: int) -> Path:
        (copied(fixture, folder) / name).write_bytes(content(size))
        return folder

    return make


def header(text: Callable[[int], bytes]) -> Make:
    """A safetensors file that is nothing but a header."""

    def content(size: int) -> bytes:
        raw = text(size)
        return struct.pack("<Q", len(raw)) + raw

    return file("tiny-gpt2/hf-safetensors", "model.safetensors", content)


def more_tensors(name: Callable[[int], str], count: int) -> Make:
    """A good checkpoint, and empty tensors of other names."""

    def make(folder: Path, size: int) -> Path:
        path = copied("tiny-gpt2/hf-safetensors", folder) / "model.safetensors"
        raw = path.read_bytes()
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        entries, end = json.loads(raw[8:start]), len(raw) - start
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
        text = json.dumps(entries | {name(i): empty for i in range(count * size)}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[start:])
        return folder

    return make


def pickle(data: Callable[[int], bytes]) -> Make:
    """A PyTorch file around a pickle."""

    def make(folder: Path, size: int) -> Path:
        with zipfile.ZipFile(copied("tiny-gpt2/hf-bin", folder) / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", data(size))
            archive.writestr("archive/version", "3\n")
        return folder

    return make


def keys_of_one_hash(size: int) -> bytes:
    """The pickle of a dictionary whose keys have the hash 0."""
    keys = (MODULUS * i for i in range(1, 25_000 * size))
    return b"\x80\x02}(" + b"".join(b"\x8a\x0a" + key.to_bytes(10, "little") + b"N" for key in keys) + b"u."


def index(rows: Callable[[int], list[tuple[bytes, bytes]]]) -> Make:
    """A TensorFlow index of these rows."""
    start = (b"", integer_field(1, 1) + bytes_field(3, integer_field(1, 1)))
    return file("tiny-gpt2/openai-tf", "model.ckpt.index", lambda size: write_table([start, *rows(size)]))


def snappy(block: Callable[[int], bytes]) -> Make:
    """A TensorFlow index of one compressed block."""

    def stored(raw: bytes, kind: int) -> bytes:
        typed = raw + bytes([kind])
        return typed + struct.pack("<I", mask(crc32c(typed)))

    def content(size: int) -> bytes:
        raw, empty = block(size), _block([], 1)
        root = _block([(b"z", varint(0) + varint(len(raw)))], 1)
        meta = len(raw) + 5
        footer = varint(meta) + varint(len(empty)) + varint(meta + len(empty) + 5) + varint(len(root))
        return stored(raw, 1) + stored(empty, 0) + stored(root, 0) + footer.ljust(40, b"\0") + MAGIC

    return file("tiny-gpt2/openai-tf", "model.ckpt.index", content)


def copies(size: int) -> bytes:
    """Copies of 60 bytes each: 3 bytes become 60."""
    count = 1_500_000 * size
    return varint(60 * (count + 1)) + bytes([59 << 2]) + b"x" * 60 + b"\xee\x3c\x00" * count


def vocabulary(extra: Callable[[int], dict[str, Any]]) -> Make:
    """A checkpoint with further tokens."""

    def make(folder: Path, size: int) -> Path:
        path = copied("gpt2-stdlib", folder) / "encoder.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | extra(size)))
        return folder

    return make


def yaml(text: Callable[[int], str]) -> Make:
    """A GPT-NeoX run with a further configuration."""
    return file("originals/neox-pipeline", "configs/more.yml", lambda size: text(size).encode())


def card(matter: Callable[[int], str]) -> Make:
    """A checkpoint whose model card has this front matter."""
    return file("tiny-gpt2/hf-safetensors", "README.md", lambda size: f"---\n{matter(size)}\n---\n".encode())


def gguf(
    metadata: Callable[[int], dict[str, Any]] = lambda n: {},
    tensors: Callable[[int], Iterable[str]] = lambda n: (),
) -> Make:
    """A GGUF model with further keys and empty tensors."""

    def make(folder: Path, size: int) -> Path:
        (path,) = copied("originals/gguf", folder).glob("*.gguf")
        model = read_gguf(path)
        entries, end = [], 0
        for name, each in model.tensors.items():
            entries.append((name, each.type, each.shape, end))
            end += -(-each.stored.nbytes // ALIGNMENT) * ALIGNMENT
        entries += [(name, TYPES["F32"], (0,), end) for name in tensors(size)]
        path.write_bytes(head_bytes({**model.metadata, **metadata(size)}, entries) + bytes(end))
        return path

    return make


#: A BundleEntryProto: float32 of shape [0].
ENTRY = b"\x08\x01\x12\x02\x12\x00"
EMPTY = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
CASES: Mapping[str, Make] = {
    "safetensors: empty tensors": header(lambda n: b"{" + b",".join(EMPTY % i for i in range(12_000 * n)) + b"}"),
    "safetensors: too many tensors": header(lambda n: b"{" + b",".join(EMPTY % i for i in range(60_000 * n)) + b"}"),
    "safetensors: empty lists": header(lambda n: b'{"a":[' + b"[]," * 3_000_000 * n + b"[]]}"),
    "safetensors: distinct names beside a model": more_tensors(lambda i: f"transformer.x{i}_{7 * i}.w", 12_000),
    "safetensors: long names beside a model": more_tensors(lambda i: f"transformer.{i}" + "h.0." * 5000 + "w", 100),
    "safetensors: mask buffers": more_tensors(lambda i: f"transformer.h.{i}.attn.bias", 12_000),
    "safetensors: many models": more_tensors(lambda i: f"m{i}.transformer.wte.weight", 12_000),
    "config: layers": config(n_layer=lambda n: 2500 * n),
    "config: unknown keys": config(_=lambda n: {f"k{i}": 1 for i in range(30_000 * n)}),
    "config: harmless keys": config(_=lambda n: {f"_k{i}": 1 for i in range(20_000 * n)}),
    "config: ids of one hash": config(eos_token_id=lambda n: [MODULUS * i for i in range(40_000 * n)]),
    "config: layers of GPT-Neo": config(
        "originals/flax-gpt-neo", num_layers=lambda n: 10**9, attention_types=lambda n: [[["global"], 10**8 * n]]
    ),
    "config: lists of layers of GPT-Neo": config(
        "originals/flax-gpt-neo",
        num_layers=lambda n: 10**4,
        attention_types=lambda n: [[["global"], 9999]] * 3000 * n,
    ),
    "vocabulary: one large id": vocabulary(lambda n: {"zzz": 2**29 * n - 1}),
    "gguf: layers": gguf(lambda n: {"gpt2.block_count": 2500 * n}),
    "gguf: keys": gguf(lambda n: {f"k{i}": "v" for i in range(950 * n)}),
    "gguf: too many keys": gguf(lambda n: {f"k{i}": i for i in range(5000 * n)}),
    "gguf: tokens": gguf(lambda n: {"tokenizer.ggml.tokens": [""] * 900_000 * n}),
    "gguf: numbers": gguf(lambda n: {"a": [1] * 900_000 * n}),
    "gguf: merges": gguf(lambda n: {"tokenizer.ggml.merges": [f"{i} {i}" for i in range(250_000 * n)]}),
    "gguf: a long text": gguf(lambda n: {"general.description": "x" * 30_000_000 * n}),
    "gguf: tensors": gguf(tensors=lambda n: (f"blk.{i}.extra" for i in range(12_000 * n))),
    "gguf: too many tensors": gguf(tensors=lambda n: (f"x{i}" for i in range(60_000 * n))),
    "merges: too many lines": file(
        "gpt2-stdlib", "vocab.bpe", lambda n: b"#version: 0.2\n" + b"abc\n" * 1_000_000 * n
    ),
    "pickle: keys of one hash": pickle(keys_of_one_hash),
    "pickle: nested tuples": pickle(lambda n: b"\x80\x02N" + b"\x85" * 150_000 * n + b"."),
    "pickle: nested lists": pickle(lambda n: b"\x80\x02" + b"]" * 70_000 * n + b"a" * (70_000 * n - 1) + b"."),
    "pickle: opcodes": pickle(lambda n: b"\x80\x02](" + b"N" * 800_000 * n + b"e."),
    "bundle: names": index(lambda n: [(b"model/h%06d/x" % i, ENTRY) for i in range(24_000 * n)]),
    "bundle: too many names": index(lambda n: [(b"%07d" % i, ENTRY) for i in range(110_000 * n)]),
    "bundle: Snappy copies": snappy(copies),
    "bundle: Snappy literals": snappy(lambda n: varint(2_500_000 * n) + b"\0a" * 2_500_000 * n),
    "bundle: state of newlines": file("tiny-gpt2/openai-tf", "checkpoint", lambda n: b"\n" * 500_000 * n),
    "yaml: a sexagesimal": yaml(lambda n: "a: 1" + ":1" * 100_000 * n),
    "yaml: keys": yaml(lambda n: "".join(f"k{i}: 1\n" for i in range(15_000 * n))),
    "yaml: keys of one hash": yaml(lambda n: "a:\n" + "".join(f"  {MODULUS * i}: 1\n" for i in range(9000 * n))),
    "yaml: a list": yaml(lambda n: "a: [" + "1," * 100_000 * n + "1]"),
    "card: keys": card(lambda n: "".join(f"k{i}: 1\n" for i in range(2500 * n))),
    "card: a sexagesimal": card(lambda n: "a: 1" + ":1" * 15_000 * n),
}
