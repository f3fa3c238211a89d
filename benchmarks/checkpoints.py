"""Random checkpoints with the real shapes in their release formats, written block by block.

They stand in for the real weights, which are not available offline.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.tf_index import Entry, index_bytes
from gptconvert.families.registry import family_named
from gptconvert.model.assembly import in_order
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.model.schemes import Row, concrete, expand, sizes_of
from gptconvert.model.tensors import Shape, filled
from gptconvert.sources.mesh_jax import PIECES
from reference_model.config import GPTConfig

#: Size → hparams of OpenAI's releases.
SIZES = {
    "124M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "355M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24},
    "774M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1280, "n_head": 20, "n_layer": 36},
    "1558M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48},
}
#: Family → (config.json keys besides the defaults, which are those of the largest released model; key of the number
#: of layers).
LARGE = {
    "gptj": ({"model_type": "gptj", "architectures": ["GPTJForCausalLM"]}, "n_layer"),
    "gpt_neox": (
        {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu_fast"},
        "num_hidden_layers",
    ),
}
BLOCK = 1 << 22
#: Small enough that every checkpoint has several shards.
SHARD_BYTES = 1 << 30
#: Number of cores that the released GPT-J is split over.
CORES = 8


def openai_checkpoint(size: str, root: Path) -> Path:
    """The checkpoint directory of ``size``, created on first use; weights are distributed as in a new GPT-2."""
    directory = root / size
    if (directory / "model.ckpt.index").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    hparams = SIZES[size]
    family = family_named("gpt2")
    config, _, _ = family.read_config("openai-tf", hparams, None, {}, Options())
    shapes = {bound.stored[0]: bound.shape for bound in expand(family.scheme("openai-tf").rows, config)}
    random, entries, offset = np.random.default_rng(0), dict[str, Entry](), 0
    with open(directory / "model.ckpt.data-00000-of-00001", "wb") as file:
        for name in sorted(shapes):
            crc, count = 0, prod(shapes[name])
            for values in _blocks(random, count, float(name.endswith("/g"))):
                raw = values.tobytes()
                crc = google_crc32c.extend(crc, raw)
                file.write(raw)
            entries[name] = Entry(1, shapes[name], offset, 4 * count, crc)
            offset += 4 * count
    (directory / "hparams.json").write_text(json.dumps(hparams, indent=2) + "\n")
    (directory / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    partial = directory / "index.partial"
    partial.write_bytes(index_bytes(entries))
    os.replace(partial, directory / "model.ckpt.index")
    return directory


@dataclass(frozen=True)
class Large:
    """A model with the shapes of a 6B or 20B model but fewer layers, so that it fits on the disk; bfloat16.

    Attributes:
        family: a key of :data:`LARGE`.
        source: ``hf`` (safetensors shards) or ``mesh-jax`` (the shards of GPT-J's trainer).
        layers: number of layers.
        sizes: keys of config.json to use instead of the full-size model's.
        shard_bytes: size of the safetensors shards.
    """

    family: str
    source: str
    layers: int
    sizes: Mapping[str, object] = field(default_factory=dict)
    shard_bytes: int = SHARD_BYTES

    @property
    def shapes(self) -> dict[str, Shape]:
        """Tensor name in Hugging Face's files → shape."""
        config, scheme = self._config(), family_named(self.family).scheme("hf")
        bounds = expand(scheme.rows, config, scheme.write_prefix)
        return {name: bound.shape for bound in bounds for name in bound.stored}

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(2 * prod(shape) for shape in self.shapes.values())

    def write(self, folder: Path) -> None:
        """Write the files to ``folder``, which must not exist yet."""
        folder.mkdir(parents=True)
        (self._write_hf if self.source == "hf" else self._write_mesh_jax)(folder)

    def _config(self) -> GPTConfig:
        config, _, _ = family_named(self.family).read_config("hf", self._raw(), None, {}, Options())
        return config

    def _raw(self) -> dict[str, object]:
        fixed, key = LARGE[self.family]
        return {**fixed, **self.sizes, key: self.layers}

    def _write_hf(self, folder: Path) -> None:
        shards, room = [dict[str, Shape]()], self.shard_bytes
        for name, shape in self.shapes.items():
            nbytes = 2 * prod(shape)
            if nbytes > room and shards[-1]:
                shards.append({})
                room = self.shard_bytes
            shards[-1][name], room = shape, room - nbytes
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards):
            file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            _write_safetensors(folder / file, shard, number)
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(self._raw()))

    def _write_mesh_jax(self, folder: Path) -> None:
        config = self._config()
        leaves = in_order(family_named("gptj").scheme("mesh-jax"), self.layers)
        for k in range(CORES):
            place, random = folder / "step_1" / f"shard_{k}", np.random.Generator(np.random.SFC64(k))
            place.mkdir(parents=True)
            for i, numbers in enumerate(np.array_split(np.arange(len(leaves) + 1), PIECES)):
                with zipfile.ZipFile(place / f"{i}.npz", "w") as archive:
                    for at, number in enumerate(numbers):
                        step = number == len(leaves)
                        array = np.int32(1) if step else _leaf(random, leaves[number], config)
                        with archive.open(f"arr_{at}.npy", "w", force_zip64=True) as file:
                            np.lib.format.write_array(file, np.asanyarray(array))
        sizes = {"layers": config.n_layer, "d_model": config.n_embd, "n_heads": config.n_head}
        rotary = {"pe": "rotary", "pe_rotary_dims": config.rotary.dim if config.rotary else 0}
        other = {"n_vocab": config.vocab_size, "norm": "layernorm", "seq": config.n_ctx}
        (folder / "config.json").write_text(json.dumps({**sizes, **rotary, **other}))


def _blocks(random: np.random.Generator, count: int, mean: float) -> Iterator[NDArray[np.float32]]:
    """``count`` values distributed like a new model's weights."""
    for start in range(0, count, BLOCK):
        values = random.standard_normal(min(BLOCK, count - start), dtype=np.float32)
        yield values * np.float32(0.02) + np.float32(mean)


def _write_safetensors(path: Path, shapes: dict[str, Shape], seed: int) -> None:
    entries, offset, random = {}, 0, np.random.Generator(np.random.SFC64(seed))
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, shape in shapes.items():
            norm = len(shape) == 1 and name.endswith("weight")
            for values in _blocks(random, prod(shape), float(norm)):
                file.write(values.astype(BFLOAT16).tobytes())


def _leaf(random: np.random.Generator, leaf: tuple[Row, str], config: GPTConfig) -> NDArray[np.void]:
    """One core's part of a parameter, as unnamed two-byte values (bfloat16), as the trainer saved it."""
    row, name = leaf
    whole = filled(0.0, BFLOAT16, concrete(row.shape, sizes_of(config)))
    vector = row.added is not None and name.endswith(row.added)
    shape = whole.shape[1:] if vector else row.shards.split(whole, CORES)[0].shape
    values = np.empty(prod(shape), BFLOAT16)
    done = 0
    for block in _blocks(random, prod(shape), float(name.endswith("scale"))):
        values[done : done + len(block)] = block
        done += len(block)
    return values.view("V2").reshape(shape)
