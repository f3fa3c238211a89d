"""Random models: every family and head, extreme sizes, scales and weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptconvert.containers.safetensors import header_bytes
from gptconvert.families.heads import FIXED_LABELS
from gptconvert.families.registry import FAMILIES, family_named
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.model.schemes import canonical_shapes, write_names
from gptconvert.model.tensors import Box, Computed, LazyTensor, TensorSet
from reference_model.config import ACTIVATIONS, CACHED_TASKS, LABELLED_TASKS, GPTConfig, Rotary

Arrays = dict[str, NDArray[Any]]
Change = Callable[[Arrays, np.random.Generator], None]


def scaled(factor: float) -> Change:
    """Every weight but those of the norms, times a factor."""

    def change(arrays: Arrays, random: np.random.Generator) -> None:
        for name in arrays:
            if ".ln_" not in f".{name}":
                arrays[name] = arrays[name] * factor

    return change


def scaled_whole(factor: float) -> Change:
    """Every weight, those of the norms too."""

    def change(arrays: Arrays, random: np.random.Generator) -> None:
        for name in arrays:
            arrays[name] = arrays[name] * factor

    return change


def saturated(gain: float) -> Change:
    """Weights that keep a vector's length, except for attention scores, which are multiplied."""

    def change(arrays: Arrays, random: np.random.Generator) -> None:
        for name, array in arrays.items():
            if array.ndim == 2 and "wte" not in name and "wpe" not in name:
                arrays[name] = random.normal(0, array.shape[1] ** -0.5, array.shape)
            if ".c_attn.weight" in name:
                arrays[name][: 2 * len(array) // 3] *= gain**0.5

    return change


def outliers(factor: float) -> Change:
    """A few features of the embeddings and of the biases are huge, as in large trained models."""

    def change(arrays: Arrays, random: np.random.Generator) -> None:
        for name, array in arrays.items():
            if name in ("wte.weight", "wpe.weight") or name.endswith("c_proj.bias"):
                array[..., random.integers(0, array.shape[-1])] *= factor

    return change


def shifted(offset: float) -> Change:
    """All features of the embeddings have a common offset, which the norms must subtract."""

    def change(arrays: Arrays, random: np.random.Generator) -> None:
        arrays["wte.weight"] = arrays["wte.weight"] + offset

    return change


def zeroed(arrays: Arrays, random: np.random.Generator) -> None:
    """Some weights are zero, or all."""
    share = random.choice([0.3, 1.0])
    for name in arrays:
        if random.random() < share:
            arrays[name] = np.zeros_like(arrays[name])


CHANGES: Mapping[str, Change] = {
    "usual": lambda arrays, random: None,
    **{f"scale {factor:g}": scaled(factor) for factor in (1e-42, 1e-38, 1e-30, 1e-10, 1e-3, 10.0, 100.0)},
    **{f"whole scale {factor:g}": scaled_whole(factor) for factor in (1e-42, 1e-30, 1e-20, 1e-6, 30.0)},
    **{f"gain {gain:g}": saturated(gain) for gain in (10.0, 30.0, 100.0)},
    **{f"outliers {factor:g}": outliers(factor) for factor in (30.0, 1000.0)},
    **{f"offset {offset:g}": shifted(offset) for offset in (3.0, 100.0)},
    "zeros": zeroed,
}


@dataclass(frozen=True, eq=False)
class Model:
    """One model, and options to export it with.

    Attributes:
        number: of the case; with ``seed`` it determines all else.
        seed: of the campaign.
        config: the architecture.
        change: name in :data:`CHANGES`.
        dtype: of the stored weights.
        options: task, cache, and level of verification.
    """

    number: int
    seed: int
    config: GPTConfig
    change: str
    dtype: np.dtype[Any]
    options: Options

    def __str__(self) -> str:
        c = self.config
        sizes = f"V {c.vocab_size} C {c.n_ctx} D {c.n_embd} H {c.n_head} L {c.n_layer} F {c.n_inner}"
        return f"{c.family} {c.task} {self.change}, {self.dtype}, {sizes}"

    def write(self, directory: Path) -> Path:
        """Write the model to ``directory`` as transformers stores it."""
        family, arrays = family_named(self.config.family), self._arrays()
        narrow = {name: np.clip(array, *_range(self.dtype)).astype(self.dtype) for name, array in arrays.items()}
        lazy = TensorSet({name: _lazy(array) for name, array in narrow.items()}, ())
        written = write_names(family.scheme("hf"), self.config, lazy)
        head, names = header_bytes(written, {"format": "pt"})
        directory.mkdir(parents=True)
        data = [np.ascontiguousarray(written[name].read()).tobytes() for name in names]
        (directory / "model.safetensors").write_bytes(head + b"".join(data))
        raw = {**family.write_config(self.config, {}), "architectures": [family.heads[self.config.task]]}
        (directory / "config.json").write_text(json.dumps(raw))
        return directory

    def _arrays(self) -> Arrays:
        random, arrays = np.random.default_rng([self.number, 1, self.seed]), Arrays()
        family = family_named(self.config.family)
        for name, shape in canonical_shapes(family.scheme("hf").rows, self.config).items():
            norm = ".ln_" in f".{name}" and name.endswith("weight")
            arrays[name] = random.normal(float(norm), 0.2, shape)
        CHANGES[self.change](arrays, random)
        return arrays


def _lazy(array: NDArray[Any]) -> LazyTensor:
    def read(box: Box) -> NDArray[Any]:
        return array[box]

    return Computed(read, array.dtype, array.shape)


def _range(dtype: np.dtype[Any]) -> tuple[float, float]:
    return (-6e4, 6e4) if dtype == np.float16 else (-1e38, 1e38)


def random_model(number: int, seed: int = 0) -> Model:
    """The model of a case."""
    random = np.random.default_rng([number, 0, seed])

    def pick(*values: Any) -> Any:
        return values[random.integers(len(values))]

    family = family_named(pick(*(f.name for f in FAMILIES)))
    heads = pick(1, 2, 3, 5) * (4 if family.name == "codegen" else 1)
    width = pick(2, 4, 6, 8, 16) if family.name != "gpt1" else pick(4, 8)
    task = pick("text-generation", "text-generation", *sorted(family.heads))
    sizes = {"n_embd": heads * width, "n_head": heads, "n_layer": pick(1, 2, 3, 6)}
    layers, usual = sizes["n_layer"], float(width**-0.5)
    varied: dict[str, Any] = {"activation": pick("gelu_tanh", "gelu_erf", *ACTIVATIONS)}
    if family.name == "gpt_neo":
        window = pick(1, 3, 8)
        local = [pick(True, False) for _ in range(layers)]
        varied |= {"attn_scale": (1.0,) * layers, "attn_window": tuple(window if here else None for here in local)}
    if family.name == "gpt1":
        varied = {"n_inner": 4 * sizes["n_embd"], "activation": pick("gelu_tanh", "relu", "silu")}
    if family.name in ("gptj", "codegen"):
        varied["rotary"] = Rotary(2 * int(random.integers(1, width // 2 + 1)), interleaved=True)
    if family.name == "gpt_neox":
        bias = pick(True, False)
        varied |= {"rotary": Rotary(pick(0, width // 2 * 2)), "residual": pick("serial", "parallel")}
        varied |= {"qkv_bias": bias, "attn_out_bias": bias}
    fields: dict[str, Any] = {
        "family": family.name,
        **sizes,
        "n_inner": pick(1, 7, 56, 4 * sizes["n_embd"]),
        "attn_scale": (usual,) * layers,
        "attn_window": (None,) * layers,
        "vocab_size": pick(1, 2, 5, 97, 97, 300),
        "n_ctx": pick(1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 40, 70),
        "norm_eps": pick(1e-5, 1e-5, 1e-12, 1e-2),
        "tied_head": pick(True, False),
        "task": task,
        "n_labels": pick(1, 2, 5) if task in LABELLED_TASKS else FIXED_LABELS.get(task, 0),
        "pad_token_id": None,
        **family.fixed,
        **varied,
    }
    config = GPTConfig(**{**fields, **({"tied_head": True} if family.name == "gpt1" else {})})
    dtype = pick(np.dtype(np.float32), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
    kv_cache = pick(None, None, False) if task in CACHED_TASKS else None
    options = Options(task=task, kv_cache=kv_cache, verify=pick("default", "default", "default", "full"))
    return Model(number, seed, config, pick(*CHANGES), dtype, options)
