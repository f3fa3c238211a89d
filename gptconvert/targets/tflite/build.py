"""The client of :mod:`.converter`: weights to a scratch directory, and files of every type back."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from gptconvert.errors import UnsupportedError, install_hint
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import PlannedFile, place
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import cast, transpose
from gptconvert.publish.writer import write_files
from gptconvert.targets.layout import TABLES
from gptconvert.targets.saved_model.process import TensorFlowError, TensorFlowProcess
from gptconvert.targets.tflite.forms import signatures_of

WEIGHTS = "weights"


class ConverterProcess(TensorFlowProcess):
    """A TensorFlow process that converts."""

    module = "gptconvert.targets.tflite.converter"


@dataclasses.dataclass(frozen=True)
class Built:
    """Files of several types, made in one TensorFlow process when the first is needed.

    Attributes:
        checkpoint: the model.
        kinds: the types.
        contents: type → bytes, as they are made.
    """

    checkpoint: Checkpoint
    kinds: Sequence[str]
    contents: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def take(self, kind: str, stop: threading.Event) -> bytes:
        """The bytes of one file, which are then dropped.

        Raises:
            UnsupportedError: TensorFlow cannot convert the model, or ``stop`` was set first.
            OutputError: the scratch directory is full.
        """
        if kind not in self.contents:
            self.contents.update(_converted(self.checkpoint, self.kinds, stop))
        return self.contents.pop(kind)


def _converted(checkpoint: Checkpoint, kinds: Sequence[str], stop: threading.Event) -> Iterator[tuple[str, bytes]]:
    flipped = [name for name, weight in checkpoint.weights.items() if len(weight.shape) == 2 and name not in TABLES]
    stored = {name: _stored(weight, name in flipped) for name, weight in checkpoint.weights.items()}
    placed, size = place((name, stored[name], name) for name in sorted(stored))
    try:
        with ConverterProcess() as tensorflow, tempfile.TemporaryDirectory(dir=tensorflow.directory) as directory:
            # Not with ``stop``, which a failure here would set: the error would count as a result of a cancellation.
            write_files(directory, [PlannedFile(WEIGHTS, size, tensors=placed)])
            tensorflow.ask(
                "convert",
                stop,
                config=checkpoint.config.as_dict(),
                special=dataclasses.asdict(checkpoint.special_ids),
                places={p.name: (p.offset, p.tensor.shape) for p in placed},
                flipped=flipped,
                signatures=signatures_of(checkpoint.config),
                kinds=list(kinds),
                directory=directory,
            )
            for kind in kinds:
                with open(os.path.join(directory, kind), "rb") as file:
                    yield kind, file.read()
    except TensorFlowError as error:
        raise UnsupportedError(
            f"TensorFlow could not convert the model to LiteRT: {error}",
            hint=f"install TensorFlow 2.21, and free memory: {install_hint('tf')}",
        ) from error


def _stored(weight: LazyTensor, flipped: bool) -> LazyTensor:
    """The weight in float32; a matrix [in, out], which the graph multiplies as a batch of one."""
    whole = cast(weight, np.dtype(np.float32))
    return transpose(whole) if flipped else whole
