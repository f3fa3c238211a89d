"""Random models for the search for false alarms: every family and head, extreme sizes, scales and weights.

Each case follows from its number alone. Run many with ``python -m tests.verify.random_exports --help``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptconvert.errors import InputError
from gptconvert.families.heads import FIXED_LABELS
from gptconvert.families.registry import FAMILIES, family_named
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.model.schemes import canonical_shapes, write_names
from gptconvert.pipeline import plan
from gptconvert.targets.verification import verify_exports
from gptconvert.verify.report import Report
from reference_model.config import ACTIVATIONS, CACHED_TASKS, LABELLED_TASKS, GPTConfig, Rotary
from tests.helpers import checkpoint_of, computed_tensors, write_planned

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
class Case:
    """One model and how to export it."""

    number: int
    config: GPTConfig
    change: str
    dtype: np.dtype[Any]
    options: Options

    def __str__(self) -> str:
        c = self.config
        sizes = f"V {c.vocab_size} C {c.n_ctx} D {c.n_embd} H {c.n_head} L {c.n_layer} F {c.n_inner}"
        return f"{self.number}: {c.family} {c.task} {self.change}, {self.dtype}, {sizes}, kv {self.options.kv_cache}"

    def checkpoint(self, directory: Path) -> Checkpoint:
        """The model, stored under ``directory`` as transformers stores it."""
        random, family = np.random.default_rng([self.number, 1]), family_named(self.config.family)
        arrays: Arrays = {}
        for name, shape in canonical_shapes(family.scheme("hf").rows, self.config).items():
            norm = ".ln_" in f".{name}" and name.endswith("weight")
            arrays[name] = random.normal(float(norm), 0.2, shape)
        CHANGES[self.change](arrays, random)
        narrow = {name: np.clip(array, *_range(self.dtype)).astype(self.dtype) for name, array in arrays.items()}
        raw = {**family.write_config(self.config, {}), "architectures": [family.heads[self.config.task]]}
        written = write_names(family.scheme("hf"), self.config, computed_tensors(narrow))
        stored = {name: np.ascontiguousarray(tensor.read()) for name, tensor in written.items()}
        return checkpoint_of(raw, stored, directory, request=Options(task=self.config.task))

    def report(self, directory: Path) -> Report:
        """The verification of its export."""
        checkpoint = self.checkpoint(directory)
        exports = plan(checkpoint, dataclasses.replace(self.options, task=self.config.task)).exports
        for export in exports:
            write_planned(directory / "out", export.files)
        return verify_exports(exports, str(directory / "out"), self.options.verify or "default")


def _range(dtype: np.dtype[Any]) -> tuple[float, float]:
    return (-6e4, 6e4) if dtype == np.float16 else (-1e38, 1e38)


def case(number: int) -> Case:
    """The case of a number."""
    random = np.random.default_rng([number, 0])

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
    options = Options(kv_cache=kv_cache, verify=pick("default", "default", "default", "full"))
    return Case(number, config, pick(*CHANGES), dtype, options)


def outcome(number: int, targets: tuple[str, ...] = ("onnx",)) -> tuple[str, str]:
    """``passed``, ``refused`` (the checkpoint itself overflows) or ``alarm``, and the case, with its report."""
    tried = case(number)
    tried = dataclasses.replace(tried, options=dataclasses.replace(tried.options, targets=targets))
    with tempfile.TemporaryDirectory() as directory:
        try:
            report = tried.report(Path(directory))
        except InputError as error:
            return "refused", f"{tried}: {error}"
    return ("passed", str(tried)) if report.passed else ("alarm", f"{tried}\n{report.table()}")


def main() -> int:
    """Run cases; print every alarm and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--to", default="onnx", help="targets, separated by commas")
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    for number in range(given.start, given.start + given.count):
        result, text = outcome(number, tuple(given.to.split(",")))
        counts[result] += 1
        if result == "alarm":
            print(text, flush=True)
    print(dict(counts), flush=True)
    return int(counts["alarm"] > 0)


if __name__ == "__main__":
    sys.exit(main())
