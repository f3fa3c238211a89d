"""The yardstick for llama.cpp: the reference model with the roundings of llama.cpp's kernels on the CPU.

llama.cpp computes in float32, but looks the GELU up in a table of float16 values, and rounds what it multiplies by
weights that are not float32: to float16 or bfloat16 as the weights are, or to 8 bits in blocks of 32 for quantised
ones. The distance of this model from the truth is how far a correct run may be.
Source: ggml-org/llama.cpp ``ggml/src/ggml-cpu/`` (``vec.h``, ``ggml-cpu.c``: ``vec_dot_type``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.ggml import BLOCK, GgmlQuantised
from gptconvert.verify.truth import PART_ELEMENTS, PrecisionPass
from reference_model.config import GPTConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class LlamaPass(PrecisionPass):
    """A pass in float32 with llama.cpp's roundings.

    Args:
        checkpoint: with its weights as stored.
        seed: round up or down by chance, as if values lay elsewhere between the neighbours; None: to the nearest.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int | None = None) -> None:
        import torch

        super().__init__(torch.float32, torch.empty(PART_ELEMENTS, dtype=torch.float64))
        self._quantised = {n for n, weight in checkpoint.weights.items() if isinstance(weight, GgmlQuantised)}
        self._random = None if seed is None else torch.Generator().manual_seed(seed)

    def _noise(self, x: Tensor) -> Tensor | float:
        """From -0.5 to 0.5 for each element, or 0."""
        import torch

        return 0.0 if self._random is None else torch.rand(x.shape, generator=self._random) - 0.5

    def _cast(self, dtype: torch.dtype, x: Tensor) -> Tensor:
        """Round to a shorter float type."""
        import torch

        return (x + x * self._noise(x) * torch.finfo(dtype).eps).to(dtype).float()

    def _in_blocks(self, x: Tensor) -> Tensor:
        """Round [..., n] to 8 bits in blocks of 32, each with a float16 scale."""
        blocks = x.reshape(*x.shape[:-1], -1, BLOCK)  # (..., n / 32, 32)
        scales = blocks.abs().amax(-1, keepdim=True) / 127  # (..., n / 32, 1)
        codes = blocks / scales.where(scales > 0, scales.new_ones(()))  # (..., n / 32, 32)
        codes = (codes + self._noise(codes)).round()  # (..., n / 32, 32)
        return (codes * scales.half().float()).reshape(x.shape)  # (..., n)

    def _gelu(self, x: Tensor) -> Tensor:
        """From the table of float16 values."""
        import torch

        from reference_model.model import ACTIVATION

        return self._cast(torch.float16, ACTIVATION["gelu_tanh"](self._cast(torch.float16, x)))

    def fill(self, module: nn.Module, stored: Mapping[str, Tensor], config: GPTConfig, prefix: str) -> None:
        """Load weights into a part of the model, and round what its layers compute."""
        import torch
        from torch import nn

        from reference_model.model import MLP, canonical_name

        super().fill(module, stored, config, prefix)
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                weight = canonical_name(f"{prefix}{name}.weight", config)
                dtype = stored[weight].dtype
                if weight in self._quantised:
                    rounding = self._in_blocks
                elif dtype in (torch.float16, torch.bfloat16):
                    rounding = functools.partial(self._cast, dtype)
                else:
                    continue
                part.forward = functools.partial(_rounded_first, rounding, part.forward)  # type: ignore[method-assign]
            elif isinstance(part, MLP):
                part.activation = self._gelu


def _rounded_first(rounding: Callable[[Tensor], Tensor], forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(rounding(x))
