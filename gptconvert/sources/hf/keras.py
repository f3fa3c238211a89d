"""``tf_model.h5``, as Keras saved transformers' TensorFlow models in HDF5. Read with h5py alone.

Sources: Keras 2 ``saving/hdf5_format.py`` (attributes ``layer_names`` and ``weight_names``, split if long) and
transformers 4's rule for converting TensorFlow names to PyTorch's. A Keras program in ``model_config`` is never read.

transformers' TFOpenAIGPT computed GELU with erf although the weights were trained with the tanh formula. Exports
follow the weights and config.json: tanh.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from gptconvert.containers.hdf5 import MAX_NAMES, find, find_group, is_dataset, lazy_tensor, names_in, open_hdf5
from gptconvert.errors import InputError, UnsafeInputError
from gptconvert.model.tensors import LazyTensor, TensorSet
from gptconvert.model.transforms import drop_leading_axis, transpose

_WHOLE_MODEL = "model_weights"


def read_keras_h5(path: str) -> TensorSet:
    """Read the weights under the names and in the layout of transformers' PyTorch models.

    Raises:
        UnsupportedError: h5py is not installed, or the data needs a compression plug-in.
        InputError: the file is damaged or was not written by Keras.
        UnsafeInputError: the file refers to other files, or expands without bound.
    """
    tensors: dict[str, LazyTensor] = {}
    with open_hdf5(path) as file:
        root = file if not file.id.links.exists(_WHOLE_MODEL.encode()) else find_group(file, _WHOLE_MODEL, path)
        has_program = "model_config" in file.attrs
        for place, given in _weights(root, path):
            dataset = find(root, place, path)
            name, orient = hf_name(given, keep_first=place == given)
            if name in tensors:
                raise InputError("two weights have the same name", path=path, item=name)
            tensors[name] = orient(lazy_tensor(dataset, path))
    notes = (f"{os.path.basename(path)}: the Keras program in model_config is not read",) if has_program else ()
    return TensorSet(tensors, (path,), notes)


def hf_name(given: str, keep_first: bool = False) -> tuple[str, Callable[[LazyTensor], LazyTensor]]:
    """PyTorch's name for a TensorFlow weight, and the transform to PyTorch's layout.

    ``tfgp_t2lm_head_model/transformer/h_._0/attn/c_attn/weight:0`` → ``transformer.h.0.attn.c_attn.weight``.

    Args:
        given: as Keras wrote it.
        keep_first: the first part is not the model's name, which sharded files leave off.
    """
    plain = re.sub(r"/[^/]*___([^/]*)/", r"/\1/", given.removesuffix(":0").replace("_._", "/"))
    parts = [part for part in plain.split("/") if part]
    if len(parts) > 1 and not keep_first:
        parts = parts[1:]
    kind = parts[-1]
    parts[-1] = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "beta": "bias"}.get(kind, kind)
    if (
        kind == "kernel"
    ):  # a Dense layer, [in, out]; "weight" is a Conv1D or an embedding, already in PyTorch's layout
        return ".".join(parts), _transpose_matrix
    return ".".join(parts), _squeeze_bias if parts[-1] == "bias" else lambda tensor: tensor


def index_name(given: str) -> str:
    """A weight's name in a shard index → its name from :func:`read_keras_h5`."""
    return hf_name(given)[0]


def _transpose_matrix(tensor: LazyTensor) -> LazyTensor:
    return transpose(tensor) if len(tensor.shape) == 2 else tensor


def _squeeze_bias(tensor: LazyTensor) -> LazyTensor:
    """TensorFlow's Conv1D stores its bias as [1, out]."""
    return drop_leading_axis(tensor) if len(tensor.shape) == 2 and tensor.shape[0] == 1 else tensor


def _weights(root: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path of the dataset, the weight's name) of every weight, in file order.

    In a shard, ``layer_names`` lists datasets instead of layers.
    """
    count = 0
    for layer in _names(root, "layer_names", path):
        found = find(root, layer, path)
        inside = [layer] if is_dataset(found) else _names(found, "weight_names", path)
        for given in inside:
            count += 1
            if count > MAX_NAMES:
                raise UnsafeInputError("more weights than any model has", path=path, expected=f"at most {MAX_NAMES}")
            yield (given if is_dataset(found) else f"{layer}/{given}"), given


def _names(group: Any, attribute: str, path: str) -> list[str]:
    """A list of names from one attribute, or from several (``weight_names0`` …) if it was too long for one."""
    pieces = [attribute] if attribute in group.attrs else []
    while not pieces or pieces[-1] != attribute:
        piece = f"{attribute}{len(pieces)}"
        if piece not in group.attrs:
            break
        pieces.append(piece)
    if not pieces:
        raise InputError(
            f"the attribute {attribute} is missing",
            path=path,
            item=group.name,
            expected="weights saved by Keras (model.save_weights)",
            found=", ".join(map(str, list(group.attrs)[:5])) or "no attributes",
        )
    names: list[str] = []
    for piece in pieces:
        names += names_in(group.attrs, piece, path)
    return names
