"""The TensorFlow process that converts: traces the SavedModel's signatures, and writes LiteRT files of every type.

Started by :mod:`.build`, never imported. TensorFlow's converter makes a float32 model; the other types are made from
it by :mod:`.rewrite`. (The converter itself would round the graph's own constants, such as epsilon and the tables of
rotary angles, to the type of the weights.)
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from gptconvert.model.generation import SpecialIds
from gptconvert.targets.child.frames import Arrays
from gptconvert.targets.child.server import serve
from gptconvert.targets.saved_model.graph import Weights
from gptconvert.targets.saved_model.signatures import signatures
from gptconvert.targets.saved_model.worker import config_of
from gptconvert.targets.tflite.rewrite import labels_of, rewritten


def convert(request: Mapping[str, Any], _: Arrays) -> tuple[Mapping[str, object], Arrays]:
    """Write one file per type, ``kinds``, in ``directory``, which holds the weights, stored [in, out]."""
    gc.disable()
    directory = request["directory"]
    saved = os.path.join(directory, "saved_model")
    weights = {name: _mapped(directory, *place) for name, place in request["places"].items()}
    _save(request, weights, saved)
    converter = tf.lite.TFLiteConverter.from_saved_model(saved, signature_keys=list(request["signatures"]))
    content = converter.convert()
    labels = labels_of(content, _canonical(weights, frozenset(request["flipped"])))
    for kind in request["kinds"]:
        with open(os.path.join(directory, kind), "wb") as file:
            file.write(rewritten(content, labels, kind))
    return {}, {}


class _Weights(Weights):
    """Weights that are all multiplied as a batch of one.

    The converter multiplies a norm into the matrix after it, so that neither would be stored as in the checkpoint; an
    axis more prevents that.
    """

    def linear(self, x: Any, prefix: str, *, weight: str | None = None, bias: bool = True) -> Any:
        name = weight or f"{prefix}.weight"
        if name in self.flipped:
            return super().linear(x, prefix, weight=weight, bias=bias)
        x = tf.matmul(tf.expand_dims(x, 0), self(name), transpose_b=True)[0]  # (N, out)
        return tf.nn.bias_add(x, self(f"{prefix}.bias")) if bias else x


def _mapped(directory: str, offset: int, shape: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.memmap(os.path.join(directory, "weights"), np.float32, "r", offset, tuple(shape))


def _save(request: Mapping[str, Any], weights: Mapping[str, Any], saved: str) -> None:
    """Save the signatures, with their weights, as a SavedModel."""
    config = config_of(request["config"])
    special = SpecialIds(**{**request["special"], "eos": tuple(request["special"]["eos"])})
    variables = {name: tf.Variable(value, name=name) for name, value in weights.items()}
    shapes = {name: value.shape for name, value in weights.items()}
    traced = _Weights(variables, shapes, frozenset(request["flipped"]))
    root = tf.Module()
    root.weights = variables
    names = request["signatures"]
    tf.saved_model.save(root, saved, signatures=signatures(traced, config, special, names))


def _canonical(weights: Mapping[str, Any], flipped: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Every weight as the converter stores it: matrices [out, in]."""
    for name, value in weights.items():
        yield name, np.ascontiguousarray(value.T if name in flipped else value)


if __name__ == "__main__":
    tf.get_logger().setLevel("ERROR")
    serve({"convert": convert}, f"TensorFlow {tf.__version__}")
