"""Small models, lazy tensors and checkpoints made from plain arrays, for all tests.

Arrays become a :class:`Checkpoint` without going through a file format, so tests of targets and the verifier do not
depend on any reader. The default sizes are chosen so that no two axes of a weight are equal.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptconvert.families.registry import understand
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import PlannedFile
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.model.tensors import Box, Computed, LazyTensor, Segment, Stored, TensorSet
from gptconvert.publish.io_settings import DEFAULT_IO, IoSettings
from gptconvert.publish.source_scan import SourceScan, TensorDigests

Arrays = dict[str, NDArray[Any]]

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
#: Real data stored next to the repository on some machines; tests that need it are skipped if it is absent.
REAL_GPT2 = ROOT.parent / "shared" / "data" / "openai-gpt2"
NO_RELEASED_FILES = "OpenAI's released files are not beside the repository"

#: A very small GPT-2 with odd sizes and n_inner != 4 D.
TINY: Mapping[str, object] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 97,
    "n_positions": 40,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 56,
    "bos_token_id": 96,
    "eos_token_id": 96,
}


def tiny_gpt2(seed: int = 0, **config: object) -> tuple[dict[str, object], Arrays]:
    """A raw Hugging Face configuration (:data:`TINY` updated with ``config``) and matching float32 weights.

    Names start with ``transformer.``; ``lm_head.weight`` is included iff ``tie_word_embeddings`` is False. Norm
    weights are near 1; the others are large enough that a swapped or transposed tensor changes the logits.
    """
    raw = {**TINY, **config}
    size = {key: int(raw[key]) for key in ("vocab_size", "n_positions", "n_embd", "n_layer")}  # type: ignore[call-overload]
    vocabulary, context, width, layers = size.values()
    inner = int(raw["n_inner"] or 4 * width)  # type: ignore[call-overload]
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for i in range(layers):
        for name, (rows, columns) in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
        }.items():
            shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = (rows, columns), (columns,)
        shapes |= {f"h.{i}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    named = {f"transformer.{name}": shape for name, shape in shapes.items()}
    if raw.get("tie_word_embeddings") is False:
        named["lm_head.weight"] = (vocabulary, width)
    random = np.random.default_rng(seed)
    arrays = {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in named.items()}
    for name in arrays:
        if ".ln_" in name and name.endswith("weight"):
            arrays[name] += 1
    return raw, arrays


def openai_layout(arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    """Hugging Face names and shapes of a GPT-2 → OpenAI's (``model/h0/attn/c_attn/w`` [1, D, 3D])."""
    renamed = {}
    for name, array in arrays.items():
        *path, kind = name.removeprefix("transformer.").split(".")
        if path[0] in ("wte", "wpe"):
            renamed[f"model/{path[0]}"] = array
            continue
        norm = path[-1].startswith("ln_")
        letter = {"weight": "g" if norm else "w", "bias": "b"}[kind]
        stem = "/".join(path).replace("h/", "h", 1) if path[0] == "h" else "/".join(path)
        renamed[f"model/{stem}/{letter}"] = array[None] if array.ndim == 2 else array
    return renamed


def openai_hparams(raw: Mapping[str, object]) -> dict[str, object]:
    """The hparams.json of a model whose config.json is ``raw``."""
    named = {"n_vocab": "vocab_size", "n_ctx": "n_positions", "n_embd": "n_embd", "n_head": "n_head"}
    return {stored: raw[key] for stored, key in {**named, "n_layer": "n_layer"}.items()}


def stored_tensors(
    path: Path, arrays: Mapping[str, NDArray[Any]], order: Iterable[str] | None = None, *, start: int = 1
) -> TensorSet:
    """Write ``arrays`` contiguously to the file ``path`` and return them as tensors whose bytes can be copied raw.

    Data starts at byte ``start``. By default that is 1, so that offsets are unaligned, as in TensorFlow's files.
    """
    offset, tensors, content = start, {}, [bytes(start)]
    for name in order or arrays:
        data = np.ascontiguousarray(arrays[name]).tobytes()
        part = Segment(str(path), offset, len(data))
        tensors[name] = Stored((part,), arrays[name].dtype, arrays[name].shape)
        content.append(data)
        offset += len(data)
    path.write_bytes(b"".join(content))
    return TensorSet(tensors, (str(path),))


def computed_tensors(arrays: Mapping[str, NDArray[Any]]) -> TensorSet:
    """``arrays`` as tensors that are not stored in a file."""

    def lazy(array: NDArray[Any]) -> LazyTensor:
        def read(box: Box) -> NDArray[Any]:
            return array[box]

        return Computed(read, array.dtype, array.shape)

    return TensorSet({name: lazy(array) for name, array in arrays.items()}, ())


def source_of(
    raw: Mapping[str, object],
    tensors: TensorSet,
    *,
    scheme: str = "hf",
    tokenizer: Mapping[str, str] | None = None,
    **fields: Any,
) -> Source:
    """A :class:`Source` as a reader would make it."""
    return Source(
        scheme=scheme,
        format=fields.pop("format", "arrays"),
        path=fields.pop("path", "model"),
        tensors=tensors,
        config=dict(raw),
        tokenizer=dict(tokenizer or {}),
        **fields,
    )


def checkpoint_of(
    raw: Mapping[str, object],
    arrays: Mapping[str, NDArray[Any]],
    directory: Path | None = None,
    *,
    scheme: str = "hf",
    request: Options | None = None,
    tokenizer: Mapping[str, str] | None = None,
    start: int = 1,
    **fields: Any,
) -> Checkpoint:
    """A checkpoint made from arrays.

    Args:
        raw: config.json (or hparams.json).
        arrays: weights under the names of ``scheme``.
        directory: where to store them; None to keep them in memory (every copy is then computed).
        scheme: naming scheme of ``raw`` and ``arrays``.
        request: options, such as the task and the number of heads.
        tokenizer: file name → path.
        start: offset of the weights in their file.
        fields: further fields of :class:`Source`.
    """
    stored = directory and stored_tensors(directory / "weights.raw", arrays, start=start)
    tensors = computed_tensors(arrays) if stored is None else stored
    source = source_of(raw, tensors, scheme=scheme, tokenizer=tokenizer, **fields)
    return understand(source, request or Options())


def openai_checkpoint(
    directory: Path, seed: int = 0, tokenizer: Mapping[str, str] | None = None, **config: object
) -> Checkpoint:
    """A tiny GPT-2 (n_inner = 4 D) under OpenAI's names, stored in a file in ``directory``."""
    raw, arrays = tiny_gpt2(seed, n_inner=None, **config)
    return checkpoint_of(
        openai_hparams(raw), openai_layout(arrays), directory, scheme="openai-tf", tokenizer=tokenizer
    )


def torch_weights(checkpoint: Checkpoint, dtype: Any = None) -> dict[str, Any]:
    """The canonical weights as torch tensors for ``GPT.from_weights``, in ``dtype`` or float64."""
    import torch

    def tensor(weight: LazyTensor) -> Any:
        return torch.from_numpy(weight.read().astype(np.float64)).to(dtype or torch.float64)

    return {name: tensor(weight) for name, weight in checkpoint.weights.items()}


def content(file: PlannedFile) -> bytes:
    """The bytes of a planned file."""
    data = bytearray(file.nbytes)
    data[: len(file.head)] = file.head
    for placed in file.tensors:
        raw = b"".join(chunk.tobytes() for chunk in placed.tensor.chunks())
        data[placed.offset : placed.offset + len(raw)] = raw
    assert len(data) == file.nbytes, file.path
    return bytes(data)


def write_planned(directory: Path, files: Iterable[PlannedFile]) -> Path:
    """Write planned files in the simplest way."""
    for file in files:
        path = directory / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(file))
    return directory


@dataclass(frozen=True)
class Examined:
    """What a scan of a checkpoint found."""

    digests: TensorDigests
    notes: tuple[str, ...]

    def of(self, tensor: LazyTensor) -> str | None:
        return self.digests.of(tensor)


def examine(
    checkpoint: Checkpoint,
    tensors: Iterable[LazyTensor] = (),
    *,
    allow_nonfinite: bool = False,
    stop: threading.Event | None = None,
    settings: IoSettings = DEFAULT_IO,
) -> Examined:
    """Run a whole scan: compare checksums, check values, hash ``tensors``."""
    scan = SourceScan(checkpoint, tensors)
    scan.run_unclaimed(stop, settings)
    return Examined(scan.digests(), scan.check_results(allow_nonfinite=allow_nonfinite))
