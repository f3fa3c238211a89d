"""The files of a Hugging Face checkpoint, local or on the hub, chosen by name alone."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from gptconvert.containers.safetensors import read_safetensors
from gptconvert.containers.torch import read_torch
from gptconvert.errors import InputError, UnsupportedError
from gptconvert.model.tensors import TensorSet
from gptconvert.sources.advice import advice_for
from gptconvert.sources.hf import flax as flax_msgpack
from gptconvert.sources.hf import keras as keras_h5

CONFIG = "config.json"


@dataclass(frozen=True)
class WeightsKind:
    """One container that transformers saves models in.

    Attributes:
        title: name shown to users.
        default: file name of an unsharded checkpoint; the index of a sharded one is called ``DEFAULT.index.json``.
        suffixes: suffixes of the files read as this kind.
        read: reads one file.
        index_name: a tensor's name in a shard index → its name from ``read``.
    """

    title: str
    default: str
    suffixes: tuple[str, ...]
    read: Callable[[str], TensorSet]
    index_name: Callable[[str], str] = str

    @property
    def index(self) -> str:
        return f"{self.default}.index.json"


#: In order of preference. A new container is one row here and one reader.
KINDS: tuple[WeightsKind, ...] = (
    WeightsKind("safetensors", "model.safetensors", (".safetensors",), read_safetensors),
    WeightsKind("PyTorch", "pytorch_model.bin", (".bin", ".pt", ".pth", ".ckpt", ".pkl"), read_torch),
    WeightsKind(
        "TensorFlow (Keras HDF5)", "tf_model.h5", (".h5", ".hdf5"), keras_h5.read_keras_h5, keras_h5.index_name
    ),
    WeightsKind(
        "Flax (msgpack)", "flax_model.msgpack", (".msgpack",), flax_msgpack.read_flax, flax_msgpack.index_name
    ),
)
#: The names under which transformers saves weights, or their index.
STANDARD_NAMES = frozenset(name for kind in KINDS for name in (kind.default, kind.index))
#: Unsupported containers: file name pattern → description.
UNSUPPORTED: Mapping[str, str] = {
    "rust_model.ot": "rust-bert weights",
    "*.gguf": "llama.cpp weights",
    "*.onnx": "an ONNX graph",
    "*.weights.h5": "weights of Keras 3, KerasNLP or KerasHub",
    "adapter_model.*": "a LoRA adapter, not a model",
}
#: Files saved beside weights, under suffixes of weights.
NOT_WEIGHTS: tuple[str, ...] = tuple(
    """optimizer* scheduler* scaler* rng_state* random_states* sampler* training_args* trainer_state* meta.pkl
    *_optim_states.pt *_model_states.pt zero_pp_rank_*""".split()
)


@dataclass(frozen=True)
class Weights:
    """The weights file chosen; ``sharded`` if it is an index."""

    kind: WeightsKind
    name: str
    sharded: bool


def weights_named(name: str) -> Weights | None:
    """How a file of this name would be read; None if its suffix is unknown."""
    stem = name.removesuffix(".index.json")
    kinds = (kind for kind in KINDS if stem.endswith(kind.suffixes))
    return next((Weights(kind, name, stem != name) for kind in kinds), None)


def choose_weights(names: Collection[str], wanted: str | None, where: str) -> tuple[Weights, list[str]]:
    """Choose the weights among the files ``names``; also returns notes on those passed over.

    Args:
        names: files present, relative to the checkpoint's directory.
        wanted: the file the user named; None to choose by preference.
        where: directory or repository, used in error messages.

    Raises:
        InputError: no weights, or not the file named.
        UnsupportedError: only unsupported kinds of weights.
    """
    if wanted is not None:
        return _asked_for(names, wanted, where), []
    present = [
        Weights(kind, name, sharded)
        for kind in KINDS
        for name, sharded in ((kind.default, False), (kind.index, True))
        if name in names
    ]
    if not present:
        raise _no_weights(names, where)
    if len(present) == 1:
        return present[0], []
    others = ", ".join(other.name for other in present[1:])
    return present[0], [f"{present[0].name} was read; other weights were not: {others} (choose with --weights-file)"]


def could_be_weights(name: str) -> bool:
    """Whether a file could hold a model under a name of its own: not an optimizer's state, an adapter or the like."""
    base = os.path.basename(name)
    beside = any(fnmatch.fnmatchcase(base, pattern) for pattern in NOT_WEIGHTS)
    return weights_named(name) is not None and not beside and unsupported_kind(name) is None


def _asked_for(names: Collection[str], wanted: str, where: str) -> Weights:
    if wanted not in names:
        found = ", ".join(name for name in sorted(names) if could_be_weights(name)) or "no weights"
        hint = "pass one of these with --weights-file, or omit the option"
        raise InputError("the weights file is missing", path=where, expected=wanted, found=found, hint=hint)
    weights = weights_named(wanted)
    if weights is None:
        known = ", ".join(suffix for kind in KINDS for suffix in kind.suffixes)
        what = unsupported_kind(wanted) or wanted
        raise UnsupportedError("unsupported kind of weights file", path=where, expected=f"one of {known}", found=what)
    return weights


def unsupported_kind(name: str) -> str | None:
    """Description of an unsupported weights file; None for other files."""
    name = os.path.basename(name)
    return next((what for pattern, what in UNSUPPORTED.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _no_weights(names: Collection[str], where: str) -> Exception:
    expected = f"{' or '.join(kind.default for kind in KINDS)}, or the index of its shards"
    shards = sorted(name for name in names if fnmatch.fnmatchcase(name, "*-?????-of-?????.*") and weights_named(name))
    if shards:
        index = re.sub(r"-\d{5}-of-\d{5}", "", shards[0]) + ".index.json"
        found, hint = f"{len(shards)} shards", f"fetch {index} as well"
        if len(shards) == 1 and "-00001-of-00001." in shards[0]:
            found, hint = shards[0], f"this is the only shard: pass --weights-file {shards[0]}"
        return InputError("the shards' index is missing", path=where, expected=index, found=found, hint=hint)
    advice = advice_for(where, names)
    if advice is not None:
        return InputError(f"no weights: this is {advice[0]}", path=where, expected=expected, hint=advice[1])
    named = sorted(filter(could_be_weights, names))
    if named:
        hint = f"if {named[0]} is the model, pass --weights-file {named[0]}"
        return InputError(
            "no weights under a standard name", path=where, expected=expected, found=", ".join(named[:5]), hint=hint
        )
    strange = {name: what for name in sorted(names) if (what := unsupported_kind(name))}
    if strange:
        listed = ", ".join(f"{name} ({what})" for name, what in strange.items())
        sources = [name for name in strange if name.endswith(".gguf")]
        return UnsupportedError(
            "no weights of a supported kind",
            path=where,
            expected=expected,
            found=listed,
            hint=f"pass the file: {os.path.join(where, sources[0])}"
            if sources
            else "convert the checkpoint that they were made from",
        )
    return InputError("no weights", path=where, expected=expected, found=", ".join(sorted(names)[:8]) or "no files")
