"""GPTQ: codes chosen so that the errors of a row cancel on text, instead of being nearest one by one.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". The columns
of a matrix are rounded in order. The error of each is compensated by the columns after it, weighted by how the inputs
of the layer correlate on the calibration text. Scales stay those of the search, so only the codes depend on the text.

One block of the model is in memory at a time. The codes go to an unlinked temporary file, from which they are
written. They are the same in every run on one machine. Another processor may sum in another order, and round a few
differently.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptconvert.model.blocks import SCALES, BlockEncoding, Codes
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import Array, Box, Computed, LazyTensor
from gptconvert.verify.evaluation import Evaluation
from gptconvert.verify.probes import Probe
from gptconvert.verify.truth import TruthPass, tensor_of

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Columns whose errors are applied to the rest of the matrix at once.
COLUMNS = 128
#: Added to the diagonal of the correlations, relative to its mean: they are singular if the text is short.
DAMPING = 0.01


class Calibration:
    """The codes of a model's 4-bit matrices, computed when the first is read.

    Args:
        checkpoint: the source.
        evaluation: the text.
    """

    def __init__(self, checkpoint: Checkpoint, evaluation: Evaluation) -> None:
        self.checkpoint, self.evaluation = checkpoint, evaluation
        self._encodings: dict[str, BlockEncoding] = {}
        self._lock = threading.Lock()
        self._found: dict[str, Array] | None = None

    def codes(self, name: str, encoding: BlockEncoding) -> LazyTensor:
        """The packed codes of a weight. All weights must be named before one is read."""
        self._encodings[name] = encoding
        shape = encoding.format.codes_shape(self.checkpoint.weights[name].shape)

        def read(box: Box) -> Array:
            with self._lock:
                if self._found is None:
                    self._found = _Pass(self.checkpoint, self.evaluation.windows, self._encodings).found()
            return self._found[name][box]

        return Computed(read, np.dtype(np.uint8), shape)


class _Pass(TruthPass):
    """The source model on the text in float32, which quantises the matrices of each block as it goes."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Probe], encodings: Mapping[str, BlockEncoding]
    ) -> None:
        super().__init__(checkpoint, windows, "float32", presents=False)
        self.passes = self.passes[1:]
        self._encodings = encodings
        self._file: Any = tempfile.TemporaryFile(prefix="gptconvert-")  # noqa: SIM115 - mapped until the program ends
        self._correlations: dict[str, Tensor] = {}
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}

    def found(self) -> dict[str, Array]:
        """Name → packed codes, mapped from the file."""
        self.run()
        self._file.flush()
        return {
            name: np.memmap(self._file, np.uint8, "r", offset, shape)
            for name, (offset, shape) in self._places.items()
        }

    def _prepare(self, block: nn.Module, i: int) -> None:
        """Record the correlations of the inputs of every matrix to quantise."""
        for name, module in block.named_modules():
            weight = f"h.{i}.{name}.weight"
            if weight in self._encodings:
                module.register_forward_pre_hook(self._recording(weight))

    def _recording(self, weight: str) -> Any:
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)  # (N, in)
            self._correlations[weight] = rows.T @ rows  # (in, in)

        return record

    def _block(self, i: int, xs: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
        outs = super()._block(i, xs, seen)
        self._quantise()
        return outs

    def _quantise(self) -> None:
        """Quantise the matrices of the block that has run."""
        for weight, correlations in sorted(self._correlations.items()):
            encoding = self._encodings[weight]
            values = np.array(self.weights[weight].read(), np.float32)  # (out, in)
            scales = np.asarray(encoding.encode(self.weights[weight])[SCALES].read(), np.float32)
            packed = encoding.format.pack(gptq(values, scales, correlations, encoding))
            self._places[weight] = self._file.tell(), packed.shape
            self._file.write(packed.tobytes())
        self._correlations.clear()

    def _head(self, xs: list[Tensor]) -> None:
        """Not needed."""


def gptq(values: Array, scales: Array, correlations: Tensor, encoding: BlockEncoding) -> Codes:
    """Codes [out, blocks, block] of a matrix [out, in] with scales [out, blocks] and input correlations [in, in]."""
    import torch

    form = encoding.format
    weight, steps = tensor_of(values).clone(), tensor_of(scales).repeat_interleave(form.block, 1)  # (out, in or more)
    rows, width = weight.shape
    inverse = torch.where(steps == 0, 0, 1 / steps)
    factor = _factor(correlations)  # (in, in)
    codes = torch.full((rows, form.blocks(width) * form.block), form.zero, dtype=torch.uint8)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        errors = torch.zeros(rows, stop - start)
        for column in range(start, stop):
            code = (weight[:, column] * inverse[:, column] + form.zero + 0.5).floor().clamp(0, 2 * form.zero - 1)
            codes[:, column] = code.to(torch.uint8)
            error = (weight[:, column] - (code - form.zero) * steps[:, column]) / factor[column, column]
            weight[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes.view(rows, -1, form.block).numpy()


def _factor(correlations: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of damped correlations [in, in]."""
    import torch

    diagonal = correlations.diagonal()
    damped = correlations.clone()
    damped.diagonal().add_(DAMPING * max(float(diagonal.mean()), float(torch.finfo(torch.float32).tiny)))
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor
