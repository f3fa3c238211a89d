"""What to do with a path that holds no checkpoint as it is: merge, unpack, or pass a directory inside it.

Every reader and the detection share these hints, so that ``hf`` and ``convert`` give the same ones.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass

from gptconvert.containers.untrusted import entries, explain_file, is_regular
from gptconvert.errors import UnsupportedError

#: Names of weights in a checkpoint's directory.
MODEL_NAMES = r"(model\.safetensors|pytorch_model\.bin|tf_model\.h5|flax_model\.msgpack)(\.index\.json)?"
_UNPACK = "unpack it, and pass the directory inside"


@dataclass(frozen=True)
class Advice:
    """A kind of directory that needs a step before it can be read.

    Attributes:
        entry: regular expression for the whole name of an entry that identifies it.
        title: its name.
        hint: what to do; ``{path}`` is the directory, ``{entry}`` the matching entry (the last if several match),
            ``{inner}`` the last entry inside it, ``{snapshot}`` the last in its ``snapshots``, and ``{shards}`` the
            directory that holds the shards.
    """

    entry: str
    title: str
    hint: str


#: The first match wins.
ADVICE: tuple[Advice, ...] = (
    Advice(
        r"zero_to_fp32\.py",
        "a DeepSpeed ZeRO checkpoint",
        "merge the weights with `cd {path} && python zero_to_fp32.py . merged`, copy config.json and the tokenizer "
        "files into {path}/merged, and pass that (old versions of the script take a file: pytorch_model.bin)",
    ),
    Advice(
        r"pytorch_model_fsdp_\d+|.*\.distcp",
        "a sharded FSDP checkpoint",
        "merge the weights with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shards} "
        "{path}/pytorch_model.bin`, and pass the directory with config.json and pytorch_model.bin",
    ),
    Advice(r"checkpoint-\d+", "a Trainer run with checkpoints inside", "pass one of them: {path}/{entry}"),
    Advice(r"snapshots", "a hub cache", "pass the snapshot inside: {path}/snapshots/{inner}"),
    Advice(r"models--.+", "a hub cache", "pass a snapshot inside: {path}/{entry}/snapshots/{snapshot}"),
    Advice(r"onnx", "an ONNX export", "convert the checkpoint that it was exported from"),
    Advice(r".*\.(zip|tar|tar\.gz|tgz|tar\.xz|tar\.bz2|7z)", "a directory with an archive", f"{{entry}}: {_UNPACK}"),
)


def advice_for(path: str, names: Collection[str] | None = None) -> tuple[str, str] | None:
    """The title of a directory that needs another step first, and the hint about it; None if unknown.

    Args:
        path: the directory, or a hub repository.
        names: its entries, if it is not local.
    """
    names = entries(path, quiet=True) if names is None or os.path.isdir(path) else names
    for each in ADVICE:
        found = [name for name in names if re.fullmatch(each.entry, name)]
        if found:
            entry = max(found, key=by_number)
            inner = max(entries(os.path.join(path, entry), quiet=True), default="COMMIT")
            snapshots = os.path.join(path, entry, "snapshots")
            snapshot = max(entries(snapshots, quiet=True), default="COMMIT")
            shards = path if entry.endswith(".distcp") else os.path.join(path, entry)
            where = {"path": path, "entry": entry, "inner": inner, "shards": shards, "snapshot": snapshot}
            return each.title, each.hint.format(**{name: shlex.quote(text) for name, text in where.items()})
    model = next((name for name in names if _is_model(os.path.join(path, name))), None)
    if model is None:
        return None
    return (
        "a directory with a checkpoint inside",
        f"pass the directory inside: {shlex.quote(os.path.join(path, model))}",
    )


def _is_model(path: str) -> bool:
    """Whether a subdirectory holds a checkpoint in Hugging Face's layout, by name."""
    names = entries(path, files_only=True, quiet=True) if os.path.isdir(path) else []
    return "config.json" in names and any(re.fullmatch(MODEL_NAMES, name) for name in names)


def by_number(name: str) -> tuple[int, str]:
    """Sort key: the last number in a name, such as a step."""
    digits = re.findall(r"\d+", name)
    return (int(digits[-1][:18]) if digits else -1, name)


def refuse_archive(path: str) -> None:
    """Refuse an archive of a model's directory.

    Raises:
        UnsupportedError: the file is a zip or tar archive, or a compressed file. Files with a name of PyTorch's pass.
    """
    if not is_regular(path) or path.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")):
        return
    explained = explain_file(path) or ""
    kind = re.match(r"is a (zip|tar|7-Zip) archive|is (gzip|bzip2|xz|zstd)-compressed", explained)
    if kind is not None:
        raise UnsupportedError(f"this file {explained.partition(';')[0].partition(' (')[0]}", path=path, hint=_UNPACK)
