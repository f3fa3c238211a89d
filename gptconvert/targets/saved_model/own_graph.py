"""Compares the graph of one of our own SavedModels with the one that this version builds for the checkpoint.

Outputs show an error only if it exceeds rounding noise with the checkpoint's weights; a wrong epsilon or mask value
may not, nor a wrong end token in ``generate``. The graph follows from the model and from the types, shapes and
orientations of the stored weights. It does not state who built it, so ``manifest.json`` beside the directory must.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptconvert.containers.json import read_json_object
from gptconvert.errors import GptConvertError, printable
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import LazyTensor
from gptconvert.publish.manifest import MANIFEST_FILE
from gptconvert.targets.layout import as_stored
from gptconvert.targets.saved_model.plan import NAME, description
from gptconvert.targets.saved_model.process import TensorFlowProcess
from gptconvert.version import __version__

MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class OwnGraph:
    """A SavedModel of ours, and how it stores the weights.

    Attributes:
        shown_as: path in reports.
        version: of gptconvert, by the manifest; None without one.
        checkpoint: the original.
        stored: canonical name → stored tensor.
        orientations: name → whether a matrix is stored transposed; None if it equals its transpose.
    """

    shown_as: str
    version: str | None
    checkpoint: Checkpoint
    stored: Mapping[str, LazyTensor]
    orientations: Mapping[str, bool | None]

    def compare(self, tensorflow: TensorFlowProcess, path: str, stop: threading.Event) -> tuple[list[str], list[str]]:
        """The differences in the directory ``path``, or a note why its graph is not compared.

        Raises:
            TensorFlowError: the request failed or was cancelled.
            UnsafeInputError: the process exceeded its limits.
        """
        if self.version is None:
            return [], [self._note(f"no {MANIFEST_FILE} of gptconvert is beside it")]
        if self.version != __version__:
            return [], [self._note(f"gptconvert {printable(self.version)} wrote it and this is {__version__}")]
        found: list[str] = []
        for flipped in self._flipped():
            request = description(self.checkpoint, self.stored, flipped)
            answer = tensorflow.ask("compare", stop, path=path, **request)
            if answer["built_by"] != answer["tensorflow"]:
                why = f"TensorFlow {printable(answer['built_by'])} built it and this is {answer['tensorflow']}"
                return [], [self._note(why)]
            if not answer["differences"]:
                return [], []
            found = found or [str(difference) for difference in answer["differences"]]
        return found, []

    def _note(self, why: str) -> str:
        return f"{self.shown_as}: its nodes were not compared, because {why}"

    def _flipped(self) -> Iterator[Sequence[str]]:
        """The matrices that may be stored transposed.

        One that equals its transpose is stored as in the source of the conversion: this one, or one that stores all
        matrices the other way.
        """
        unknown = [name for name, flipped in self.orientations.items() if flipped is None]
        known = [name for name, flipped in self.orientations.items() if flipped]
        here = [name for name in unknown if as_stored(name, self.checkpoint.weights[name])[1]]
        yield [*known, *here]
        if unknown:
            yield [*known, *(name for name in unknown if name not in here)]


def version_of(path: str) -> str | None:
    """The version of gptconvert that wrote the SavedModel at ``path``, by the manifest beside it; None if unknown."""
    manifest = os.path.join(os.path.dirname(os.path.abspath(path)), MANIFEST_FILE)
    try:
        found = read_json_object(manifest, MAX_MANIFEST_BYTES, "the manifest")
    except GptConvertError:  # none, or another program's
        return None
    tool, targets = found.get("tool"), found.get("targets")
    if not isinstance(tool, dict) or tool.get("name") != "gptconvert":
        return None
    return str(tool.get("version")) if isinstance(targets, list) and NAME in targets else None
