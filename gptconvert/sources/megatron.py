"""Megatron-LM's GPT-2: ``model_optim_rng.pt`` of a model that was not split over devices.

Sources: NVIDIA/Megatron-LM ``checkpointing.py`` (file names, the entries ``args``, ``checkpoint_version``, ``model``)
and Hugging Face's ``megatron_gpt2`` conversion. The version determines the order of the q, k and v rows:
0: [3, H, hd] (the released 345M model, which records no version), 1: [H, hd, 3], 2 and 3: [H, 3, hd].
The run's arguments, a pickled ``argparse.Namespace``, are read as plain data; nothing is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from gptconvert.containers.torch import TorchFile, read_if_torch, read_torch_pickle, tensors_of
from gptconvert.containers.untrusted import entries, no_such_path, read_small
from gptconvert.errors import InputError, UnsafeInputError, UnsupportedError, UsageError
from gptconvert.model.options import Options
from gptconvert.model.source import Source
from gptconvert.sources.format import EDITS, Format
from gptconvert.sources.tokenizer_files import find_tokenizer

NAME, TITLE = "megatron", "Megatron-LM GPT-2 (model_optim_rng.pt)"
FILES = ("model_optim_rng.pt", "model_rng.pt")
TRACKER = "latest_checkpointed_iteration.txt"
FIRST_RANK = "mp_rank_00"
#: Checkpoint version → naming scheme, named after the first version with that layout.
SCHEMES: Mapping[int, str] = {0: "megatron:0", 1: "megatron:1", 2: "megatron:2", 3: "megatron:2"}
#: Arguments that record how many devices one copy of the model was split over.
SPLITS = ("model_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
#: Directory names: one iteration, or one part of the model.
_FOLDER = re.compile(r"iter_\d{7,}|mp_rank_\d\d(_\d{3})*")
#: Limits on the nesting of dictionaries and on the entries of one level.
MAX_DEPTH, MAX_ENTRIES = 8, 100_000
#: Writes a checkpoint that this reader accepts.
_MERGE = (
    "run Megatron-LM's tools/checkpoint/convert.py --model-type GPT --loader {loader} --saver megatron "
    "--target-tensor-parallel-size 1 --target-pipeline-parallel-size 1, and convert its output; pass "
    "--activation erf if the model was trained with bias_gelu_fusion off"
)


def read_megatron(file: TorchFile, options: Options) -> Source:
    """Read the checkpoint in this file.

    Raises:
        InputError: Megatron-LM did not write it.
        UnsupportedError: a model split over several devices, or written by Megatron-Core.
        UnsafeInputError: dictionaries nested beyond the limits.
    """
    path = file.path
    tree = _top(file, path)
    arguments = _arguments(tree.get("args"), path)
    version = _version(tree, path)
    tensors = tensors_of(file, _flat(tree["model"], path), path)
    _refuse_core(tensors, path)
    note = f"checkpoint version {version}" + ("" if "checkpoint_version" in tree else " (not recorded in the file)")
    return Source(
        scheme=SCHEMES[version],
        format=f"{TITLE}, version {version}",
        path=path,
        tensors=tensors,
        config=arguments,
        config_path=path,
        tokenizer=find_tokenizer([os.path.dirname(path)]),
        notes=(note,) if arguments else (note, "the training run's arguments are not recorded in the file"),
    )


def find_megatron(path: str, options: Options) -> TorchFile:
    """Open a checkpoint by its file, ``mp_rank_00``, iteration's directory or run's directory.

    Raises:
        InputError: the file is missing or damaged.
        UnsupportedError: several files, one per device.
        UnsafeInputError: the pickle names anything but tensors and plain data.
        UsageError: a step was given for a path that is not a run's directory.
    """
    if not os.path.lexists(path):
        raise no_such_path(path, hub=False)
    return read_torch_pickle(locate(path, options.step))


def locate_megatron(path: str, options: Options) -> TorchFile | None:
    """As :func:`find_megatron` for Megatron-LM's names and PyTorch files with a ``language_model``; else None."""
    if os.path.isdir(path):
        named = any(name in (TRACKER, *FILES) or _FOLDER.fullmatch(name) for name in entries(path, quiet=True))
        return find_megatron(path, options) if named else None
    if os.path.basename(path) in FILES and os.path.lexists(path):
        return find_megatron(path, options)
    file = read_if_torch(path)
    model = file.tree.get("model") if file is not None and isinstance(file.tree, dict) else None
    matches = isinstance(model, dict) and any(str(key).split(".")[0] == "language_model" for key in model)
    return file if matches else None


def locate(path: str, step: int | None) -> str:
    """Resolve ``path`` to one file.

    Raises:
        InputError: no checkpoint, or not that iteration.
        UnsupportedError: several files, one per device.
        UsageError: a step was given for a path that is not a run's directory.
    """
    if not os.path.isdir(path):
        return path
    names = entries(path)
    if TRACKER in names or any(re.fullmatch(r"iter_\d{7,}|release", name) for name in names):
        return locate(_iteration(path, names, step), None)
    if step is not None:
        raise UsageError(
            "--step needs the directory of a run",
            path=path,
            expected=f"{TRACKER} or iter_… inside",
            hint="pass the run's directory, or omit --step",
        )
    ranks = [name for name in names if re.fullmatch(r"mp_rank_\d\d(_\d{3})*", name)]
    if len(ranks) > 1 or any(rank != FIRST_RANK for rank in ranks):
        raise _split(f"{len(ranks)} parts: {', '.join(ranks[:4])}", path)
    if ranks:
        return locate(os.path.join(path, FIRST_RANK), None)
    for name in FILES:
        if name in names:
            return os.path.join(path, name)
    found = ", ".join(names[:8]) or "an empty directory"
    raise InputError(
        "no Megatron-LM checkpoint in this directory", path=path, expected=" or ".join(FILES), found=found
    )


def _iteration(path: str, names: list[str], step: int | None) -> str:
    """The directory of one iteration: that of ``step``, or the one the tracker file names, or the last."""
    if step is not None:
        name = f"iter_{step:07d}"
    elif TRACKER in names:
        tracker = os.path.join(path, TRACKER)
        text = read_small(tracker, 256, TRACKER).decode("ascii", "replace").strip()
        if not re.fullmatch(r"\d{1,12}|release", text):
            raise InputError(
                "invalid iteration",
                path=tracker,
                expected="a number, or release",
                found=repr(text)[:60],
                hint="correct the file, or pass the iteration's directory",
            )
        name = text if text == "release" else f"iter_{int(text):07d}"
    else:
        name = max(name for name in names if name.startswith(("iter_", "release")))
    if name not in names:
        present = ", ".join(n for n in names if n.startswith(("iter_", "release")))
        raise InputError(
            "the iteration is missing",
            path=path,
            expected=name,
            found=present or "no iteration",
            hint="pass one of these directories" if present else f"copy {name} into this directory",
        )
    return os.path.join(path, name)


def _top(file: TorchFile, path: str) -> dict[str, object]:
    """The file's top-level dictionary, which has an entry ``model``."""
    tree = file.tree if isinstance(file.tree, dict) else {}
    if not isinstance(tree.get("model"), dict) and any(str(key).startswith("model0") for key in tree):
        raise _split("a virtual pipeline (model0, model1 …)", path)
    if not isinstance(tree.get("model"), dict):
        found = ", ".join(str(key) for key in list(tree)[:8]) or f"a {type(file.tree).__name__}"
        raise InputError("not a Megatron-LM checkpoint", path=path, expected="an entry 'model'", found=found)
    return {str(key): value for key, value in tree.items()}


def _arguments(given: object, path: str) -> dict[str, object]:
    """The run's arguments that are numbers, booleans, strings or None.

    Raises:
        UnsupportedError: they record that the model was split.
    """
    if not isinstance(given, dict):
        return {}
    plain: dict[str, object] = {
        str(k): v for k, v in given.items() if v is None or isinstance(v, (bool, int, float, str))
    }
    wrong = {key: plain[key] for key in SPLITS if plain.get(key) not in (None, 1)}
    if wrong:
        raise _split(", ".join(f"{key} = {value}" for key, value in wrong.items()), path)
    return plain


def _version(tree: Mapping[str, object], path: str) -> int:
    version = tree.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or version not in SCHEMES:
        raise UnsupportedError(
            "unknown Megatron-LM checkpoint version; it determines the order of q, k and v",
            path=path,
            item="checkpoint_version",
            expected=f"one of {', '.join(map(str, SCHEMES))}",
            found=repr(version)[:40],
        )
    return int(version)


def _flat(model: object, path: str) -> dict[object, object]:
    """Nested dictionaries flattened into one, with names joined by dots.

    Raises:
        UnsafeInputError: cycles, or deeper or larger than any model.
    """
    found: dict[object, object] = {}
    level: list[tuple[str, object]] = [("", model)]
    for _ in range(MAX_DEPTH):
        inside = [
            (f"{name}.{key}".lstrip("."), v) for name, d in level if isinstance(d, dict) for key, v in d.items()
        ]
        found.update((name, value) for name, value in inside if not isinstance(value, dict))
        level = [(name, value) for name, value in inside if isinstance(value, dict)]
        if not level:
            return found
        if sum(len(value) for _, value in level if isinstance(value, dict)) > MAX_ENTRIES:
            break
    raise UnsafeInputError(
        "dictionaries nested too deeply, or with too many entries",
        path=path,
        expected=f"at most {MAX_DEPTH} levels and {MAX_ENTRIES} entries",
    )


def _refuse_core(names: Mapping[str, object], path: str) -> None:
    core = [name for name in names if re.search(r"(^|\.)decoder\.layers\.", name)]
    if core:
        raise UnsupportedError(
            "this is a Megatron-Core checkpoint, whose layout is not supported",
            path=path,
            expected="tensors under language_model",
            found=", ".join(core[:2]),
            hint=_MERGE.format(loader="mcore"),
        )


def _split(found: str, path: str) -> UnsupportedError:
    return UnsupportedError(
        "this Megatron-LM model was split over several devices, which is not supported",
        path=path,
        expected=f"one part, {FIRST_RANK}",
        found=found,
        hint=_MERGE.format(loader="megatron (mcore for a Megatron-Core model)"),
    )


FORMAT = Format(
    name=NAME,
    title=TITLE,
    locate=locate_megatron,
    find=find_megatron,
    read=read_megatron,
    accepts=frozenset({"step", "n_head", "activation"}) | EDITS,
)
