"""Finds the artifacts to verify in a file or directory without a plan.

Only ``gptconvert verify`` searches directories. A conversion verifies exactly the exports that it planned
(:mod:`gptconvert.targets.verification`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from gptconvert.containers.gguf import is_later_file
from gptconvert.containers.untrusted import no_such_path
from gptconvert.errors import UnsupportedError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.sources.advice import refuse_archive
from gptconvert.targets.openai_tf.verify import is_openai_folder
from gptconvert.targets.target import Candidate

#: Files that identify safetensors weights.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")

#: Target, path of the artifact, path for reports.
Found = tuple[str, str, str]


def find_candidates(checkpoint: Checkpoint, path: str, seed: int = 0) -> list[Candidate]:
    """Artifacts at ``path`` that can be compared with a checkpoint: a file, or those in a directory.

    ``seed`` is that of the probes.

    Raises:
        InputError: no such path.
        UnsupportedError: there are none.
    """
    if not os.path.lexists(path):
        raise no_such_path(path, hub=False)
    found = list(_in_directory(path) if os.path.isdir(path) else _file(path))
    if not found:
        refuse_archive(path)
        raise UnsupportedError(
            "no artifact to verify",
            path=path,
            expected=f"*.onnx, onnx/*.onnx, {', '.join(SAFETENSORS)}, *.gguf, *.tflite, saved_model/",
            hint="pass a directory that holds one of these, or the file itself",
        )
    return [Candidate(target, artifact, shown_as, checkpoint, seed=seed) for target, artifact, shown_as in found]


def _file(path: str) -> Iterator[Found]:
    for target in ("onnx", "safetensors", "gguf", "tflite"):
        if path.endswith(f".{target}"):
            yield target, path, os.path.basename(path)


def _in_directory(path: str) -> Iterator[Found]:
    found = [*_graphs_and_weights(path), *_saved_models(path)]
    yield from found
    # A directory may hold OpenAI's files directly; if it also holds another artifact, they belong to that artifact.
    for folder in (os.path.join(path, "openai-tf"), *([] if found else [path])):
        if is_openai_folder(folder):
            yield "openai-tf", folder, os.path.basename(folder)


def _graphs_and_weights(path: str) -> Iterator[Found]:
    for folder in ("", "onnx"):
        inside = os.path.join(path, folder)
        for name in sorted(os.listdir(inside)) if os.path.isdir(inside) else []:
            if name.endswith(".onnx"):
                yield "onnx", os.path.join(inside, name), f"{folder}/{name}" if folder else name
            elif name in SAFETENSORS and not folder:
                yield "safetensors", os.path.join(inside, name), name
            elif name.endswith(".gguf") and not folder and not is_later_file(name):
                yield "gguf", os.path.join(inside, name), name
            elif name.endswith(".tflite") and not folder:
                yield "tflite", os.path.join(inside, name), name


def _saved_models(path: str) -> Iterator[Found]:
    for folder in (os.path.join(path, "saved_model"), path):
        if os.path.isfile(os.path.join(folder, "saved_model.pb")):
            yield "tf", folder, os.path.basename(os.path.abspath(folder))
