"""Write GPT-1 and GPT-2 in OpenAI's formats, in the folder ``openai-tf``.

GPT-2 becomes the TensorFlow checkpoint that ``tf.train.Saver`` writes and restores, with the variable names of
openai/gpt-2 ``src/model.py``: all tensors back to back in the order of their names, an index with their checksums,
``hparams.json`` and the tokenizer under OpenAI's names. GPT-1 becomes the ten array files of its release: all weights
concatenated, then split into parts of nearly equal size. Both formats record only sizes, so a model that differs in
anything else is refused, with all reasons at once.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise

import numpy as np

from gptconvert.containers.tf_index import DATA_TYPES, Entry, index_bytes
from gptconvert.errors import UnsupportedError
from gptconvert.families.registry import family_named
from gptconvert.model.assembly import in_order
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import FLOATS
from gptconvert.model.encodings import cast_to
from gptconvert.model.export import Export, Finish, Placed, PlannedFile, place
from gptconvert.model.options import Options
from gptconvert.model.schemes import Bound, Scheme, expand, from_canonical, sizes_of
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import run_of
from gptconvert.targets.package.tokenizer import tokenizer_files
from reference_model.config import GPTConfig

NAME, FOLDER = "openai-tf", "openai-tf"
PREFIX = "model.ckpt"
#: The text format of TensorFlow's CheckpointState, as the Saver writes it.
CHECKPOINT_STATE = f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n'
GPT1_FILES = 10
#: Family → OpenAI's names for vocab.json and merges.txt.
TOKENIZER_NAMES: Mapping[str, tuple[str, str]] = {
    "gpt1": ("encoder_bpe_40000.json", "vocab_40000.bpe"),
    "gpt2": ("encoder.json", "vocab.bpe"),
}
#: Values that programs reading these files assume.
FIXED: Mapping[str, object] = {"activation": "gelu_tanh", "norm_eps": 1e-5, "tied_head": True}
TASKS = ("text-generation", "feature-extraction")
#: Features per head in OpenAI's models, from which readers derive the number of heads.
HEAD_FEATURES = 64

Named = tuple[str, LazyTensor, str]


def plan(checkpoint: Checkpoint, options: Options) -> tuple[Export, ...]:
    """One export: the folder ``openai-tf``.

    Raises:
        UnsupportedError: the format cannot express this model; all reasons are listed.
    """
    checkpoint = cast_to(checkpoint, options.dtype)
    reasons = why_not(checkpoint)
    if reasons:
        raise UnsupportedError(
            "OpenAI's format cannot express this model: " + "; ".join(reasons),
            hint="use --to safetensors, which preserves it",
        )
    files = _gpt1(checkpoint) if checkpoint.config.family == "gpt1" else _gpt2(checkpoint)
    tokenizer, notes = _tokenizer(checkpoint)
    return (Export(NAME, FOLDER, checkpoint, (*files, *tokenizer), notes=notes),)


def why_not(checkpoint: Checkpoint) -> list[str]:
    """All reasons why OpenAI's format cannot express a model."""
    config, reasons = checkpoint.config, []
    fixed = {**FIXED, "n_inner": 4 * config.n_embd, "attn_window": (None,) * config.n_layer}
    values = asdict(config)
    reasons += [f"{key} is {values[key]!r}, not {value!r}" for key, value in fixed.items() if values[key] != value]
    if any(scale != config.head_dim**-0.5 for scale in config.attn_scale):
        reasons.append("attention scores are not scaled by 1/√(features per head) in every layer")
    if config.task not in TASKS:
        reasons.append(f"it has a head for {config.task}")
    dtypes = {weight.dtype.newbyteorder("=") for weight in checkpoint.weights.values()}
    if config.family == "gpt1" and (len(dtypes) > 1 or any(dtype.kind != "f" for dtype in dtypes)):
        names = ", ".join(sorted(map(str, dtypes)))
        reasons.append(f"its weights are {names}, not all float32 or all float16 (use --dtype)")
    if config.family == "gpt2" and not dtypes <= {*FLOATS}:
        reasons.append(f"its weights are {', '.join(sorted(map(str, dtypes)))}")
    return reasons


def _gpt2(checkpoint: Checkpoint) -> tuple[PlannedFile, ...]:
    """The TensorFlow checkpoint and ``hparams.json``."""
    named = sorted(_named(checkpoint, family_named("gpt2").scheme("openai-tf")))
    placed, nbytes = place(named, alignment=1)
    finish = _index_of(placed)
    index_nbytes = len(finish(lambda _: 0, threading.Event()))
    state, hparams = CHECKPOINT_STATE.encode(), _hparams(checkpoint.config)
    return (
        PlannedFile.of_bytes(f"{FOLDER}/checkpoint", state),
        PlannedFile.of_bytes(f"{FOLDER}/hparams.json", hparams),
        PlannedFile(f"{FOLDER}/{PREFIX}.data-00000-of-00001", nbytes, b"", placed),
        PlannedFile(f"{FOLDER}/{PREFIX}.index", index_nbytes, finish=finish),
    )


def _index_of(placed: tuple[Placed, ...]) -> Finish:
    """The index file, deferred until the checksums are known; its size does not depend on them."""

    def finish(crc32c: Callable[[Placed], int], stop: threading.Event) -> bytes:
        return index_bytes(
            {
                p.name: Entry(
                    data_type=DATA_TYPES[p.tensor.dtype.newbyteorder("=")],
                    shape=p.tensor.shape,
                    offset=p.offset,
                    nbytes=p.tensor.nbytes,
                    crc32c=crc32c(p),
                )
                for p in placed
            }
        )

    return finish


def _gpt1(checkpoint: Checkpoint) -> tuple[PlannedFile, ...]:
    """``params_0.npy`` … and ``params_shapes.json``; ``hparams.json`` only if needed for the number of heads."""
    config = checkpoint.config
    named = _in_order(checkpoint, family_named("gpt1").scheme("openai-gpt1"))
    total = sum(tensor.size for _, tensor, _ in named)
    cuts = [i * total // GPT1_FILES for i in range(GPT1_FILES + 1)]
    files = [_array_file(i, named, start, stop) for i, (start, stop) in enumerate(pairwise(cuts))]
    shapes = json.dumps([list(tensor.shape) for _, tensor, _ in named]).encode()
    files.append(PlannedFile.of_bytes(f"{FOLDER}/params_shapes.json", shapes))
    if config.head_dim != HEAD_FEATURES:
        files.append(PlannedFile.of_bytes(f"{FOLDER}/hparams.json", _hparams(config)))
    return tuple(files)


def _array_file(number: int, named: list[Named], start: int, stop: int) -> PlannedFile:
    """Elements ``start`` to ``stop`` of the concatenated weights, as numpy would save them."""
    head = io.BytesIO()
    dtype = named[0][1].dtype.newbyteorder("=")
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (stop - start,)}
    np.lib.format.write_array_header_1_0(head, header)
    pieces, position = [], 0
    for name, tensor, canonical in named:
        low, high = max(start - position, 0), min(stop - position, tensor.size)
        if low < high:
            whole = (low, high) == (0, tensor.size)
            pieces.append((name if whole else f"{name}[{low}:{high}]", run_of(tensor, low, high), canonical))
        position += tensor.size
    content = head.getvalue()
    placed, nbytes = place(pieces, len(content), alignment=1)
    return PlannedFile(f"{FOLDER}/params_{number}.npy", nbytes, content, placed)


def _named(checkpoint: Checkpoint, scheme: Scheme) -> list[Named]:
    """(OpenAI's name, tensor in OpenAI's layout, canonical name) of every tensor."""
    return [_stored(bound, checkpoint) for bound in expand(scheme.rows, checkpoint.config)]


def _in_order(checkpoint: Checkpoint, scheme: Scheme) -> list[Named]:
    """The same, in the order of a file without names."""
    by_name = {each[0]: each for each in _named(checkpoint, scheme)}
    return [by_name[name] for _, name in in_order(scheme, checkpoint.config.n_layer)]


def _stored(bound: Bound, checkpoint: Checkpoint) -> Named:
    [(name, tensor)] = from_canonical(bound, checkpoint.weights[bound.canonical], sizes_of(checkpoint.config)).items()
    return name, tensor, bound.canonical


def _hparams(config: GPTConfig) -> bytes:
    """``hparams.json`` with OpenAI's keys, in its order and layout."""
    keys = {"n_vocab": config.vocab_size, "n_ctx": config.n_ctx, "n_embd": config.n_embd}
    return (json.dumps({**keys, "n_head": config.n_head, "n_layer": config.n_layer}, indent=2) + "\n").encode()


def _tokenizer(checkpoint: Checkpoint) -> tuple[tuple[PlannedFile, ...], tuple[str, ...]]:
    """The vocabulary and the merges under OpenAI's names, if the checkpoint has them, and notes for the user."""
    found, _ = tokenizer_files(checkpoint)
    if not {"vocab.json", "merges.txt", "tokenizer.json"} <= found.keys():
        other = ", ".join(sorted(name for name in found if name != "tokenizer_config.json"))
        return (), (f"OpenAI's format has no files for this tokenizer ({other})",) if other else ()
    files = {"vocab.json": found["vocab.json"], "merges.txt": found["merges.txt"]}
    added = _added_tokens(found)
    if added:
        files["vocab.json"] = json.dumps({**json.loads(found["vocab.json"]), **added}).encode("ascii")
    names = dict(zip(files, TOKENIZER_NAMES[checkpoint.config.family], strict=True))
    planned = (PlannedFile.of_bytes(f"{FOLDER}/{names[name]}", data) for name, data in files.items())
    counted = "1 added token is" if len(added) == 1 else f"{len(added)} added tokens are"
    note = f"{counted} in {names['vocab.json']}: OpenAI's code decodes such tokens, but never encodes text to them"
    return tuple(planned), (note,) if added else ()


def _added_tokens(found: Mapping[str, bytes]) -> dict[str, int]:
    """The tokens that ``tokenizer.json`` adds to ``vocab.json``, in the byte alphabet if it is byte-level."""
    raw = json.loads(found["tokenizer.json"])
    alphabet = _byte_alphabet() if (raw.get("decoder") or {}).get("type") == "ByteLevel" else None
    known = json.loads(found["vocab.json"])
    added = {token["content"]: token["id"] for token in raw.get("added_tokens", ()) if token["content"] not in known}
    if alphabet is None:
        return added
    return {"".join(alphabet[byte] for byte in content.encode()): number for content, number in added.items()}


def _byte_alphabet() -> list[str]:
    """Byte → the printable character that represents it: openai/gpt-2 ``src/encoder.py``, ``bytes_to_unicode``."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
