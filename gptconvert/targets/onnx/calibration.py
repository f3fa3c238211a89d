"""GPTQ: codes chosen so that the errors of a row cancel on text, instead of being nearest one by one.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". The columns
of a matrix are rounded in order. The error of each is compensated by the columns after it, weighted by how the inputs
of the layer correlate on the calibration text. Scales stay those of the search, so only the codes depend on the text.

One block of the model is in memory at a time. The codes go to an unlinked temporary file, from which they are
written. They do not depend on the number of cores, because torch runs in one thread. Another kind of processor may
sum in another order, and round a few codes differently.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptconvert.errors import InputError
from gptconvert.model.blocks import SCALES, BlockEncoding, BlockFormat, Codes
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.tensors import Array, Box, Computed, LazyTensor
from gptconvert.verify.background import one_torch_thread
from gptconvert.verify.evaluation import Evaluation
from gptconvert.verify.probes import Probe
from gptconvert.verify.truth import TruthPass, tensor_of

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Inputs whose errors are applied to the rest of the matrix at once.
COLUMNS = 64
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
        with one_torch_thread():
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
            packed = encoding.format.pack(gptq(values, scales, correlations, encoding.format))
            self._places[weight] = self._file.tell(), packed.shape
            self._file.write(packed.tobytes())
        self._correlations.clear()

    def _head(self, xs: list[Tensor]) -> None:
        """Not needed."""


def gptq(values: Array, scales: Array, correlations: Tensor, form: BlockFormat) -> Codes:
    """Codes [out, blocks, block] of a matrix [out, in] with scales [out, blocks] and input correlations [in, in]."""
    import torch

    out, width = values.shape
    rest = tensor_of(values).T.contiguous()  # (in, out): an input's weights are contiguous
    steps = tensor_of(scales).T.repeat_interleave(form.block, 0)  # (in or more, out)
    inverse = torch.where(steps == 0, 0, 1 / steps)
    factor = _factor(correlations)  # (in, in)
    codes = torch.full((form.blocks(width) * form.block, out), form.zero, dtype=torch.uint8)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        errors = torch.empty(stop - start, out)
        for i in range(start, stop):
            code = (rest[i] * inverse[i] + (form.zero + 0.5)).floor_().clamp_(0, 2 * form.zero - 1)  # (out)
            codes[i] = code.to(torch.uint8)
            torch.div(rest[i] - (code - form.zero) * steps[i], factor[i, i], out=errors[i - start])
            rest[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.reshape(out, -1, form.block).numpy()


def _factor(correlations: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped correlations, [in, in].

    If P reverses the order and P H P = L L^T, it is P L^-1 P.

    Raises:
        InputError: the correlations are not finite.
    """
    import torch

    if not bool(correlations.isfinite().all()):
        raise InputError("the checkpoint itself computes NaN or infinity on the calibration text")
    damped = correlations.double().flip(0, 1)  # a copy
    damped.diagonal().add_(DAMPING * max(float(damped.diagonal().mean()), torch.finfo(torch.float32).tiny))
    lower = torch.linalg.cholesky(damped)
    identity = torch.eye(len(lower), dtype=lower.dtype)
    factor: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()
    return factor
