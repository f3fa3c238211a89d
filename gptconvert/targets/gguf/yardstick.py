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


def _in_blocks(x: Tensor) -> Tensor:
    """Round [..., n] to 8 bits in blocks of 32, each with a float16 scale."""
    blocks = x.unflatten(-1, (-1, BLOCK))  # (..., n / 32, 32)
    scales = blocks.abs().amax(-1, keepdim=True) / 127  # (..., n / 32, 1)
    codes = (blocks / scales.where(scales > 0, scales.new_ones(()))).round()  # (..., n / 32, 32)
    return (codes * scales.half().float()).flatten(-2)  # (..., n)


def _roundings() -> Mapping[torch.dtype, Callable[[Tensor], Tensor]]:
    """Type of the weights → what it does to the values that they are multiplied by."""
    import torch

    return {
        torch.float16: lambda x: x.half().float(),
        torch.bfloat16: lambda x: x.bfloat16().float(),
    }


class LlamaPass(PrecisionPass):
    """A pass in float32 with llama.cpp's roundings.

    Args:
        checkpoint: with its weights as stored.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch

        super().__init__(torch.float32, torch.empty(PART_ELEMENTS, dtype=torch.float64))
        self._quantised = {n for n, weight in checkpoint.weights.items() if isinstance(weight, GgmlQuantised)}

    def fill(self, module: nn.Module, stored: Mapping[str, Tensor], config: GPTConfig, prefix: str) -> None:
        """Load weights into a part of the model, and round what its layers compute."""
        from torch import nn

        from reference_model.model import ACTIVATION, MLP, canonical_name

        super().fill(module, stored, config, prefix)
        kinds, gelu = _roundings(), ACTIVATION["gelu_tanh"]
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                weight = canonical_name(f"{prefix}{name}.weight", config)
                rounding = _in_blocks if weight in self._quantised else kinds.get(stored[weight].dtype)
                if rounding is not None:
                    part.forward = functools.partial(_rounded_first, rounding, part.forward)  # type: ignore[method-assign]
            elif isinstance(part, MLP):
                part.activation = lambda x: gelu(x.half().float()).half().float()


def _rounded_first(rounding: Callable[[Tensor], Tensor], forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(rounding(x))
