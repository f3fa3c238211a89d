"""The source model in float32: its logits on a text, and text sampled from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.verify.background import one_torch_thread
from gptconvert.verify.probes import Integers, Probe
from gptconvert.verify.tasks import is_pooled, pooled_tokens
from gptconvert.verify.truth import PART_ELEMENTS, PrecisionPass, TruthPass, tensor_of

if TYPE_CHECKING:
    from torch import Tensor

#: Seed of sampled text.
SEED = 0
#: Positions whose logits are computed at once.
AT_ONCE = 64


class SourceModel(TruthPass):
    """The source model on some windows, in float32: at most one block of it is in memory, and then its head.

    float32 is enough: its rounding moves a KL divergence by less than 1e-9.

    Args:
        checkpoint: the model.
        windows: prompts.
        exact: compute in float64 instead.
        instead: another pass to compute in.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Probe],
        *,
        exact: bool = False,
        instead: PrecisionPass | None = None,
    ) -> None:
        super().__init__(checkpoint, windows, "float32", presents=False)
        self.passes = self.passes[:1] if exact else self.passes[1:] if instead is None else (instead,)
        self.run()

    def _head(self, xs: list[Tensor]) -> None:
        import torch

        from reference_model.model import Head, canonical_name

        self.hidden = xs[0][0]  # (N, D)
        with torch.device("meta"):
            self._module = Head(self.config)
        names = [canonical_name(f"head.{name}", self.config) for name, _ in self._module.named_parameters()]
        stored = {name: tensor_of(self.weights[name].read()) for name in names}
        self.passes[0].fill(self._module, stored, self.config, "head.")

    def logits(self, window: Probe) -> Iterator[tuple[slice, Tensor]]:
        """(positions, logits [n, V]) of a window, a few positions at a time; only one if the task pools them.

        Raises:
            InputError: they are not finite.
        """
        import torch

        tokens = self._tokens(window)
        if is_pooled(self.config, "logits"):
            tokens = tokens[pooled_tokens(self.config, window)]
        for start in range(0, len(tokens), AT_ONCE):
            some = slice(start, min(start + AT_ONCE, len(tokens)))
            with torch.no_grad():
                logits = self._module.per_token(self.hidden[None, tokens[some]])["logits"][0]  # (n, V)
            yield some, _finite(logits)

    def last_logits(self, windows: Sequence[Probe]) -> Tensor:
        """Logits [n, V] of each window's last position. Raises as :meth:`logits`."""
        import torch

        last = [int(self._tokens(window)[-1]) for window in windows]
        with torch.no_grad():
            return _finite(self._module.per_token(self.hidden[None, last])["logits"][0])

    def _tokens(self, window: Probe) -> Integers:
        """Indices of a window's tokens among all."""
        (tokens,) = (row.tokens for row in self.truth.pack.rows if row.probe is window)
        return tokens


def sample(checkpoint: Checkpoint, start: int, rows: int, length: int) -> Integers:
    """Token ids [rows, length] drawn from the model after the id ``start``, which is the first of each row.

    Computed in one thread: the ids do not depend on the number of cores, and small products in two threads mostly
    wait for each other.

    Raises:
        InputError: the model's logits are not finite.
    """
    import torch

    from reference_model.model import GPT

    weights = {name: tensor_of(weight.read()) for name, weight in checkpoint.weights.items()}
    pass_ = PrecisionPass(torch.float32, torch.empty(PART_ELEMENTS, dtype=torch.float64))
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    pass_.fill(model, weights, checkpoint.config, "")
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.full((rows, 1), start)
    past = None
    with torch.no_grad(), one_torch_thread():
        for position in range(length - 1):
            places = torch.full((rows, 1), position)
            logits, past = model(ids[:, -1:], torch.ones(rows, position + 1), places, past)
            drawn = torch.multinomial(_finite(logits[:, -1]).softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, drawn), 1)
    return np.asarray(ids.numpy(), np.int64)


def _finite(logits: Tensor) -> Tensor:
    if bool(logits.isfinite().all()):
        return logits
    raise InputError(
        "the checkpoint itself computes NaN or infinity", item="logits", hint="a weight is damaged, or too large"
    )
