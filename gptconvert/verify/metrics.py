"""The rule: errors are judged in units of a correct model's own rounding noise.

t is the truth (float64), e the yardstick (the reference model in the candidate's computing type), c the candidate.
The principle comes from ``torch._dynamo.utils.same``: compare with a float64 run, not with a hand-picked tolerance.
Correct exports measure ratios between 0.7 and 1.6; docs/verification.md lists what planted bugs measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[Any]

TINY = 2.0**-1022
#: Elements compared at once, each with several temporaries in float64: the logits of a few tokens.
ELEMENTS_AT_ONCE = 1 << 20
#: rmse(c, t) may be this many times rmse(e, t).
MAX_RMSE_RATIO = 4.0
#: max|c - t| may be this many times max|e - t|.
MAX_ABS_RATIO = 8.0
#: Added to both limits, in roundings of the typical value: a yardstick of few numbers can be zero by chance.
FLOOR_ROUNDINGS = 8.0
#: With fewer tokens than this, the yardstick's error may be small by chance: one rounding of a large attention score
#: (thousands in GPT-Neo, which does not scale them) outweighs all others, and may go one way in the candidate and the
#: other in the yardstick. The yardstick's error over all probes then counts if it is larger; of several yardsticks,
#: the widest counts.
FEW_TOKENS = 8
#: With noise above this share of the values themselves, a wrong result passes as rounding. Ordinary models stay below
#: 1e-4.
MOST_NOISE = 0.01
#: Distance from 1 to the next number; unit roundoff is half of it.
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
#: Numbers below this may be rounded to zero, whatever their relative error.
UNDERFLOW = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}


@dataclass(frozen=True, eq=False)
class Errors:
    """Errors of values [N, width] against the truth, per token.

    Attributes:
        square: [N] sum of squared errors; of several yardsticks, the mean of their sums.
        largest: [N] largest absolute error.
        widest: [N] sum of squared errors of the yardstick with the largest.
    """

    square: Tensor
    largest: Tensor
    widest: Tensor

    @classmethod
    def of(cls, values: Tensor, truth: Tensor) -> Errors:
        """Errors of ``values`` (any type) against float64 ``truth``, both [N, width]."""
        difference = values.double().sub_(truth) if values.dtype != truth.dtype else values - truth
        largest = difference.amax(1).maximum(difference.amin(1).neg_())  # of the magnitudes, without a copy of them
        square = difference.square_().sum(1)
        return cls(square, largest, square)

    @classmethod
    def of_several(cls, yardsticks: Sequence[Tensor], truth: Tensor) -> Errors:
        """The spread of ``yardsticks`` [N, width] each around the truth."""
        import torch

        errors = [cls.of(values, truth) for values in yardsticks]
        squares, largest = torch.stack([e.square for e in errors]), torch.stack([e.largest for e in errors])  # (k, N)
        return cls(squares.mean(0), largest.amax(0), squares.amax(0))

    def at(self, tokens: Any) -> Errors:
        """The errors of some tokens, given as an index, a slice or a mask."""
        return Errors(self.square[tokens], self.largest[tokens], self.widest[tokens])

    @classmethod
    def of_all(cls, pieces: Sequence[Errors]) -> Errors:
        """The errors of all ``pieces``, concatenated."""
        import torch

        fields = ([piece.square, piece.largest, piece.widest] for piece in pieces)
        return cls(*(torch.cat(column) for column in zip(*fields, strict=True)))


@dataclass
class Measure:
    """Sums over one tensor in one probe group, from which the figures are computed.

    Attributes:
        tensor: its name (``logits``, ``present.3.key``, ``h.3``).
        epsilon: of the computing type.
        underflow: of the computing type.
        typical: root mean square of the truth over all probes. The few numbers of one group may be small by chance,
            while rounding errors scale with the terms of a sum, not with the sum.
        usual_rmse: the yardstick's rmse over all probes.
        usual_max: the yardstick's largest error over all probes.
    """

    tensor: str
    epsilon: float
    underflow: float = 0.0
    typical: float = 0.0
    usual_rmse: float = 0.0
    usual_max: float = 0.0
    tokens: int = 0
    count: int = 0
    truth_square: float = 0.0
    error_square: float = 0.0
    error_max: float = 0.0
    noise_square: float = 0.0
    noise_widest: float = 0.0
    noise_max: float = 0.0

    def add(self, errors: Errors, noise: Errors, truth: Tensor) -> None:
        """Add tokens: errors and noise [n], truth [n, width]."""
        self.tokens += len(truth)
        self.count += truth.numel()
        self.truth_square += float(truth.square().sum())
        self.error_square += float(errors.square.sum())
        self.noise_square += float(noise.square.sum())
        self.noise_widest += float(noise.widest.sum())
        self.error_max = max(self.error_max, float(errors.largest.max()))
        self.noise_max = max(self.noise_max, float(noise.largest.max()))

    def _root(self, square: float) -> float:
        return math.sqrt(square / self.count) if self.count else 0.0

    @property
    def rmse(self) -> float:
        """Root mean square error of the candidate."""
        return self._root(self.error_square)

    @property
    def noise_rmse(self) -> float:
        """Root mean square error of the yardstick."""
        return self._root(self.noise_square)

    @property
    def floor(self) -> float:
        """Error allowed on top of the noise."""
        return FLOOR_ROUNDINGS * max(
            self.epsilon * self._root(self.truth_square), self.epsilon * self.typical, self.underflow
        )

    @property
    def most_rmse(self) -> float:
        """Largest rmse allowed."""
        few = self.tokens < FEW_TOKENS
        noise = max(self._root(self.noise_widest), self.usual_rmse) if few else self.noise_rmse
        return MAX_RMSE_RATIO * noise + self.floor

    @property
    def most(self) -> float:
        """Largest absolute error allowed."""
        noise = max(self.noise_max, self.usual_max) if self.tokens < FEW_TOKENS else self.noise_max
        return MAX_ABS_RATIO * noise + self.floor

    @property
    def ratio(self) -> float:
        """R: the candidate's error in units of the noise."""
        return self.rmse / self.noise_rmse if self.noise_rmse else math.inf if self.rmse else 0.0

    @property
    def ok(self) -> bool:
        """Whether both errors are within their limits. Comparisons with NaN are false, so NaN never passes."""
        return self.rmse <= self.most_rmse and self.error_max <= self.most

    @property
    def noise_share(self) -> float:
        """The yardstick's error over all probes, as a share of the values."""
        return self.usual_rmse / self.typical if self.typical else 0.0

    @property
    def error_ratio(self) -> float:
        """Larger of the two errors over their limits; above 1 fails."""
        parts = ((self.rmse, self.most_rmse), (self.error_max, self.most))
        return max((a / b if b else math.inf if a else 0.0) for a, b in parts)

    def as_dict(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "tensor": self.tensor,
            "ratio": significant(self.ratio),
            "rmse": significant(self.rmse),
            "max_abs": significant(self.error_max),
            "noise_rmse": significant(self.noise_rmse),
            "noise_max_abs": significant(self.noise_max),
            "rms": significant(self._root(self.truth_square)),
            "ok": self.ok,
        }


@dataclass
class LogitSimilarity:
    """Familiar measures of logits; reported, never judged.

    Attributes:
        tokens: how many were compared.
        same_top: how many have the same most likely id; ties within the noise count as the same.
        max_divergence: largest Kullback-Leibler divergence of the two next-token distributions, in nats.
        min_cosine: smallest cosine of the two logit vectors.
    """

    tokens: int = 0
    same_top: int = 0
    max_divergence: float = 0.0
    min_cosine: float = field(default=1.0)

    def add(self, values: Tensor, truth: Tensor, noise_max: float) -> None:
        """Add logits [n, V] and their float64 truth [n, V]; ``noise_max`` is the yardstick's largest error."""
        values = values.double()
        candidate, exact = values.log_softmax(1), truth.log_softmax(1)  # (n, V) each
        cosines = (values * truth).sum(1) / (values.norm(dim=1) * truth.norm(dim=1)).clamp(min=TINY)  # (n)
        behind = truth.amax(1) - truth.gather(1, values.argmax(1, keepdim=True))[:, 0]  # (n), 0 for the same top id
        self.tokens += len(values)
        self.same_top += int((behind <= 4 * noise_max).sum())
        self.max_divergence = max(self.max_divergence, float((exact.exp() * (exact - candidate)).sum(1).amax()))
        self.min_cosine = min(self.min_cosine, float(cosines.amin()))

    @property
    def top1(self) -> float:
        """Share of tokens with the same most likely id."""
        return self.same_top / self.tokens if self.tokens else 1.0

    def as_dict(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "tokens": self.tokens,
            "top1": significant(self.top1),
            "max_divergence": significant(self.max_divergence),
            "min_cosine": significant(self.min_cosine, 9),
        }


def pieces(tokens: int, width: int) -> Iterator[slice]:
    """Slices of ``tokens`` rows of ``width``, each of at most :data:`ELEMENTS_AT_ONCE` elements, or one row."""
    step = max(1, ELEMENTS_AT_ONCE // max(1, width))
    yield from (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def significant(value: float, digits: int = 3) -> float | None:
    """``value`` to ``digits`` significant digits; None for values that JSON cannot express."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
