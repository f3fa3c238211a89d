"""Rotary positions: which features of a head are rotated, and how fast. Does not import torch.

Sources: Su et al. 2021 (rotary positions); Peng et al. 2023, "YaRN"; bloc97's NTK-aware interpolation; Llama 3.1's
model.py; Hugging Face ``modeling_rope_utils.py``, whose names the parameters of scaling keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

#: Kind of scaling → the parameters that it reads.
SCALINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
#: Parameters without a default.
REQUIRED = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are reduced for a context longer than that of the original training.

    Attributes:
        kind: ``linear`` divides all frequencies by ``factor``; ``yarn`` and ``llama3`` divide only the slow ones,
            with a ramp between; ``dynamic`` changes nothing up to n_ctx.
        factor: of the context length, above 0.
        original_max_position_embeddings: context length of the original training (yarn, llama3).
        attention_factor: of cosines and sines (yarn); None to derive it from ``factor`` and the two ``mscale``.
        beta_fast, beta_slow: turns within the original context where the ramp begins and ends (yarn); None: 32 and 1.
        mscale, mscale_all_dim: see ``attention_factor``.
        truncate: whether the ramp's ends are rounded to whole features (yarn); None for true.
        low_freq_factor, high_freq_factor: turns within the original context where the ramp ends and begins (llama3).
    """

    kind: str
    factor: float
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021) on the first ``width`` features of each head.

    Attributes:
        dim: nominal number of rotated features, which divides the exponents; 0 for no positions at all.
        base: of the frequencies.
        interleaved: whether pairs are (0,1), (2,3) … as in GPT-J, or (0, dim/2), (1, dim/2+1) … as in GPT-NeoX.
        scaling: None for none.
    """

    dim: int
    base: float = 10000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None

    @property
    def width(self) -> int:
        """Number of features rotated: ``dim``, rounded up to whole pairs."""
        return self.dim + self.dim % 2

    @property
    def frequencies(self) -> tuple[float, ...]:
        """Radians per position of each pair, [width/2]."""
        plain = tuple(self.base ** -(i / self.dim) for i in range(0, self.dim, 2))
        return plain if self.scaling is None else SCALED[self.scaling.kind](self, self.scaling, plain)

    @property
    def magnitude(self) -> float:
        """Factor of all cosines and sines."""
        scaling = self.scaling
        if scaling is None or scaling.kind != "yarn":
            return 1.0
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        if scaling.mscale and scaling.mscale_all_dim:
            return _yarn_scale(scaling.factor, scaling.mscale) / _yarn_scale(scaling.factor, scaling.mscale_all_dim)
        return _yarn_scale(scaling.factor)

    def problem(self, head_dim: int) -> tuple[str, object, str] | None:
        """(field, value, why it is impossible), for heads of ``head_dim`` features."""
        if self.interleaved and (self.dim % 2 or not 0 < self.dim <= head_dim):
            return "rotary.dim", self.dim, f"must be even, from 2 to {head_dim}: adjacent features form pairs"
        if self.dim < 0 or self.width > head_dim:
            return "rotary.dim", self.dim, f"must be from 0 to {head_dim}, rounded up to even"
        if not 0 < self.base < math.inf:
            return "rotary.base", self.base, "must be above 0"
        if self.scaling is not None and (problem := self._scaling_problem(self.scaling)):
            return problem
        return None if self._is_finite() else ("rotary", self, "its frequencies overflow")

    def _is_finite(self) -> bool:
        try:
            return all(map(math.isfinite, (*self.frequencies, self.magnitude)))
        except (ArithmeticError, ValueError):
            return False

    def _scaling_problem(self, scaling: RopeScaling) -> tuple[str, object, str] | None:
        if scaling.kind not in SCALINGS:
            return "rotary.scaling.kind", scaling.kind, f"must be one of {', '.join(SCALINGS)}"
        for name in SCALINGS[scaling.kind]:
            value = 1 if name == "truncate" else getattr(scaling, name)
            if name in REQUIRED if value is None else not 0 < value < math.inf:
                return f"rotary.scaling.{name}", value, f"{scaling.kind} needs a number above 0"
        if scaling.kind == "llama3" and scaling.low_freq_factor == scaling.high_freq_factor:
            return "rotary.scaling.high_freq_factor", scaling.high_freq_factor, "must differ from low_freq_factor"
        if scaling.kind == "dynamic" and self.dim == 2:
            return "rotary.dim", self.dim, "dynamic scaling divides by dim - 2"
        if scaling.kind == "yarn" and (self.dim % 2 or self.base == 1):
            return "rotary.dim", self.dim, "yarn needs an even number, and a base other than 1"
        return None


Frequencies = tuple[float, ...]


def _linear(rotary: Rotary, scaling: RopeScaling, plain: Frequencies) -> Frequencies:
    return tuple(frequency / scaling.factor for frequency in plain)


def _dynamic(rotary: Rotary, scaling: RopeScaling, plain: Frequencies) -> Frequencies:
    """The plain frequencies: up to n_ctx, the base does not grow."""
    return plain


def _yarn(rotary: Rotary, scaling: RopeScaling, plain: Frequencies) -> Frequencies:
    """Plain frequencies up to the pair that turns ``beta_fast`` times, divided ones from ``beta_slow`` on."""
    context = scaling.original_max_position_embeddings or 1

    def pair(turns: float) -> float:
        """Index of the pair that turns so many times within the original context."""
        return rotary.dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rotary.base))

    low, high = pair(scaling.beta_fast or 32), pair(scaling.beta_slow or 1)
    if scaling.truncate is None or scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    span = high - low or 0.001
    ramp = (min(max((i - low) / span, 0), 1) for i in range(len(plain)))
    return tuple(f / scaling.factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True))


def _yarn_scale(factor: float, mscale: float = 1) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def _llama3(rotary: Rotary, scaling: RopeScaling, plain: Frequencies) -> Frequencies:
    """Plain frequencies from ``high_freq_factor`` turns on, divided ones below ``low_freq_factor`` turns."""
    low, high = scaling.low_freq_factor or 0.0, scaling.high_freq_factor or 0.0

    def scaled(frequency: float) -> float:
        turns = (scaling.original_max_position_embeddings or 0) * frequency / (2 * math.pi)
        if turns < low:
            return frequency / scaling.factor
        if turns > high:
            return frequency
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * frequency / scaling.factor + smooth * frequency

    return tuple(map(scaled, plain))


SCALED: Mapping[str, Callable[[Rotary, RopeScaling, Frequencies], Frequencies]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
