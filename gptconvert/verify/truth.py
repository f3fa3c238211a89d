"""The truth: what a checkpoint computes on the probes in float64, with one block of the model in memory at a time.

The tokens of all probes are packed into one sequence of N tokens, so that each weight is read once and each linear
layer is one large product; a block-diagonal mask keeps the probes apart. A second pass beside it computes the
yardstick, the reference model in the candidate's computing type; only its distance from the truth is kept. Further
yardsticks round differently: together they measure how far rounding alone can move an output.

Shapes: N tokens; n tokens and p past tokens of one part; V, D, H, hd as in ``reference_model/config.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.tensors import Array, LazyTensor
from gptconvert.verify.heap import trim_heap
from gptconvert.verify.metrics import Errors, pieces
from gptconvert.verify.packing import Pack, Part
from gptconvert.verify.probes import Integers, Probe
from reference_model.config import GPTConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from reference_model.model import Attend, KeyValue

#: Elements of a weight converted at once: with the matrix product's own packed copy they fit a core's share of the
#: cache (1.5 times as fast as whole weights, whose float64 copies go through memory twice).
PART_ELEMENTS = 1 << 19
#: In a varied pass, two of this many elements of a block's input are moved by one rounding.
MOVED = 16
#: The heap is trimmed after this many blocks; each trim costs a few milliseconds.
TRIM_BLOCKS = 4
#: Tokens that the head runs on at once: the logits of a long sequence take as much memory as a small model.
HEAD_TOKENS = 64


@dataclass(eq=False)
class Truth:
    """What the checkpoint computes.

    Attributes:
        pack: where each probe's tokens are.
        values: tensor name → float64 [N, width]: the task's outputs for every token, ``present.{i}.key`` and
            ``.value`` (heads concatenated), and with taps ``embedding`` and ``h.{i}``.
        noise: tensor name → errors of the yardstick.
    """

    pack: Pack
    values: dict[str, Tensor]
    noise: dict[str, Errors]

    def keep(self, name: str, exact: Tensor, noise: Errors) -> None:
        """Record float64 values [N, width] and the yardstick's error.

        Raises:
            InputError: the checkpoint computes NaN or infinity.
        """
        if not bool(exact.isfinite().all() & noise.square.isfinite().all()):
            raise InputError(
                "the checkpoint itself computes NaN or infinity",
                item=name,
                hint="a weight is damaged, or a half-precision type has overflowed: try --dtype fp32",
            )
        self.values[name], self.noise[name] = exact, noise


class PrecisionPass:
    """A pass over the model in one type.

    Args:
        dtype: the type to compute in.
        scratch: float64 buffer for converted parts of weights, as long as the longest part; passes may share it.
        varied: draws the places where rounding differs from that of a plain pass: elements of every block's input are
            moved by one rounding, which redraws all those after it, and products are summed in another order. None:
            plain.
    """

    def __init__(self, dtype: torch.dtype, scratch: Tensor, varied: torch.Generator | None = None) -> None:
        self.dtype, self._scratch, self._part_elements = dtype, scratch.view(dtype), len(scratch)
        self._varied = varied
        self.pasts: dict[Part, KeyValue] = {}  # only those that are the same in every layer

    def fill(self, module: nn.Module, stored: Mapping[str, Tensor], config: GPTConfig, prefix: str) -> None:
        """Load weights into a part of the model. Linear layers keep theirs as stored and convert them in use."""
        from torch import nn

        from reference_model.model import fill

        fill(module, stored.__getitem__, config, prefix)
        for part in module.modules():
            if isinstance(part, nn.Linear) and (part.weight.dtype != self.dtype or self._varied):
                part.forward = functools.partial(self._linear, part.weight, part.bias)  # type: ignore[method-assign]
            elif next(part.children(), None) is None:
                part.to(self.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """``x``, or in a varied pass with some elements moved by one rounding, up or down.

        Few are enough to redraw the roundings after it; all would add as much noise as those.
        """
        import torch

        if self._varied is None:
            return x
        draws = torch.randint(MOVED, x.shape, generator=self._varied)
        steps = (draws == 0).to(self.dtype) - (draws == 1).to(self.dtype)
        return x + x * steps * torch.finfo(self.dtype).eps

    def _linear(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, [..., in] → [..., out], for a weight of another type, or in a varied pass.

        Converts and multiplies as much at a time as fits the processor's cache, so that the converted weight is never
        written to memory.
        """
        rows = x.flatten(0, -2)  # (N, in)
        out = rows.new_zeros(len(rows), len(weight))  # (N, out)
        by_output = weight.is_contiguous()
        dense = weight if by_output else weight.T  # as stored: [out, in] or [in, out]
        step = max(1, self._part_elements // dense.shape[1])
        for start in range(0, len(dense), step):
            some = slice(start, start + step)
            part = self._typed(dense[some])
            if by_output:
                out[:, some] = self._product(rows, part.T)
            else:
                out.addmm_(rows[:, some], part)
        if bias is not None:
            out += bias.to(self.dtype)
        return out.view(*x.shape[:-1], len(weight))

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b``; in a varied pass, the sum of two products of random length."""
        import torch

        if self._varied is None or len(b) < 2:
            return a @ b
        cut = int(torch.randint(1, len(b), (), generator=self._varied))
        return a[:, cut:] @ b[cut:] + a[:, :cut] @ b[:cut]

    def _typed(self, stored: Tensor) -> Tensor:
        """A part of a weight in this pass's type, valid until the next call in any pass that shares the scratch."""
        if stored.numel() > len(self._scratch):
            return stored.to(self.dtype)
        return self._scratch[: stored.numel()].view(stored.shape).copy_(stored)


def tensor_of(array: Array) -> Tensor:
    """A torch view of an array that may be read-only; never write to it."""
    import torch

    if array.dtype == BFLOAT16:
        return tensor_of(array.view(np.int16)).view(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


class TruthPass:
    """Computes the truth and the yardstick on one pack of probes, block by block.

    Args:
        checkpoint: weights as stored in the candidate.
        probes: the probes to run.
        compute: the candidate's computing type (``float32``, ``float16``).
        presents: whether the candidate returns keys and values.
        taps: whether to keep every block's output.
        yardsticks: how many passes measure the noise, the first one plain.
        head_tokens: tokens that the head runs on at once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        probes: Sequence[Probe],
        compute: str,
        *,
        presents: bool,
        taps: bool = False,
        yardsticks: int = 1,
        head_tokens: int = HEAD_TOKENS,
    ) -> None:
        import torch

        self.config, self.weights = checkpoint.config, checkpoint.weights
        scratch = torch.empty(PART_ELEMENTS, dtype=torch.float64)
        dtype = self._compute = getattr(torch, compute)
        varied = [torch.Generator().manual_seed(number) for number in range(1, yardsticks)]
        self.passes = (
            PrecisionPass(torch.float64, scratch),
            *(PrecisionPass(dtype, scratch, generator) for generator in (None, *varied)),
        )
        self.taps, self._head_tokens = taps, head_tokens
        windowed = any(window is not None for window in self.config.attn_window)
        self.truth = Truth(Pack(probes, windowed=windowed), {}, {})
        layers = self.config.n_layer if presents and any(probe.compare_presents for probe in probes) else 0
        # One allocation: small long-lived tensors would keep the heap from shrinking between blocks.
        self.cache = torch.empty(layers, 2, self.truth.pack.length, self.config.n_embd, dtype=torch.float64)

    def run(self, advance: Callable[[int], None] | None = None) -> Truth:
        """Compute the truth. ``advance(1)`` is called after each layer."""
        import torch

        with torch.no_grad():
            parts, windows = self.truth.pack.parts, self.config.attn_window
            seen = {window: [part.seen(window) for part in parts] for window in set(windows)}
            xs = self._embedding()
            for i in range(self.config.n_layer):
                xs = self._block(i, xs, seen[windows[i]])
                if advance is not None:
                    advance(1)
            self._head(xs)
        return self.truth

    def _embedding(self) -> list[Tensor]:
        """The embedding [1, N, D] in each pass; reads only the rows of the tables that occur."""
        import torch

        from reference_model.model import Embedding

        pack = self.truth.pack
        ids, token = np.unique(pack.ids, return_inverse=True)
        positions, position = np.unique(pack.positions, return_inverse=True)
        used = {"wte.weight": ids, "wpe.weight": positions}
        tables = {name: _rows(self.weights[name], rows) for name, rows in used.items() if name in self.weights}
        small = dataclasses.replace(self.config, vocab_size=len(ids), n_ctx=len(positions))
        xs = []
        for pass_ in self.passes:
            embedding = Embedding(small)  # too small to justify importing the meta device's kernels
            pass_.fill(embedding, tables, small, "embedding.")
            x = embedding(torch.from_numpy(token[None]), torch.from_numpy(position[None]))  # (1, N, D)
            xs.append(pass_.rounded(x))
        self._tap("embedding", xs)
        return xs

    def _block(self, i: int, xs: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
        """Run one block in every pass, [1, N, D] → [1, N, D], and record keys and values. ``seen`` is per part."""
        import torch

        from reference_model.model import Block

        prefix = f"h.{i}."
        stored = {name: tensor_of(w.read()) for name, w in self.weights.items() if name.startswith(prefix)}
        outs, caches = [], []
        for pass_, x in zip(self.passes, xs, strict=True):
            with torch.device("meta"):
                block = Block(self.config, i)
            pass_.fill(block, stored, self.config, prefix)
            self._prepare(block, i)
            block.attn.attend = self._in_parts(seen, self._caches(pass_, i))
            out, present = block(x, seen[0], self._angles(pass_))
            outs.append(pass_.rounded(out))
            caches.append([cache[0].transpose(0, 1).flatten(1) for cache in present])  # (N, D) each
        for part, name in enumerate(("key", "value") if len(self.cache) else ()):
            exact, *yardsticks = (cache[part] for cache in caches)
            self._keep(f"present.{i}.{name}", [self.cache[i, part].copy_(exact), *yardsticks])
        self._tap(f"h.{i}", outs)
        del stored, caches  # memory freed after the trim would be kept until the next one
        if i % TRIM_BLOCKS == 0:
            trim_heap()
        return outs

    def _prepare(self, block: nn.Module, i: int) -> None:
        """Called with every block before it runs."""

    def _angles(self, pass_: PrecisionPass) -> KeyValue | None:
        """Rotary angles, [1, 1, N, dim] each; None if positions are not rotary."""
        import torch

        from reference_model.model import rotary_angles

        rotary, positions = self.config.rotary, torch.from_numpy(self.truth.pack.positions[None])
        return None if rotary is None else rotary_angles(rotary, positions, pass_.dtype)

    def _caches(self, pass_: PrecisionPass, layer: int) -> list[KeyValue | None]:
        """Per part, keys and values [1, H, p + n, hd] each: its past, then room for its own; None without a past."""
        from torch.nn import functional

        compute, caches = self._compute, []
        for part in self.truth.pack.parts:
            cache = pass_.pasts.get(part)
            if cache is None and (past := part.past(layer, self.config)) is not None:
                # The past as the candidate receives it, rounded to its type; exact from there on.
                key, value = (tensor.to(compute).to(pass_.dtype) for tensor in past)
                n = len(part.tokens)
                cache = functional.pad(key, (0, 0, 0, n)), functional.pad(value, (0, 0, 0, n))
                if part.same_past_everywhere:
                    pass_.pasts[part] = cache
            caches.append(cache)
        return caches

    def _in_parts(self, seen: list[Tensor], caches: list[KeyValue | None]) -> Attend:
        """``reference_model.model.attend`` part by part: [1, H, N, hd] x 3 → [1, H, N, hd] and the new k and v."""
        import torch

        from reference_model.model import attend

        parts = self.truth.pack.parts

        def in_parts(q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: KeyValue | None) -> tuple[Tensor, KeyValue]:
            mixed = torch.empty_like(q)
            for part, sees, cache in zip(parts, seen, caches, strict=True):
                tokens = torch.from_numpy(part.tokens)
                own_q, own_k, own_v = (x[:, :, tokens] for x in (q, k, v))  # (1, H, n, hd) each
                if cache is not None:
                    cache[0][:, :, part.past_length :], cache[1][:, :, part.past_length :] = own_k, own_v
                    own_k, own_v = cache  # (1, H, p + n, hd) each
                mixed[:, :, tokens], _present = attend(own_q, own_k, own_v, sees, None)
            return mixed, (k, v)

        return in_parts

    def _head(self, xs: list[Tensor]) -> None:
        """Record the task's outputs for every token, a limited number at a time."""
        import torch

        from reference_model.model import Head, canonical_name

        with torch.device("meta"):
            heads = [Head(self.config) for _ in self.passes]
        names = [canonical_name(f"head.{name}", self.config) for name, _ in heads[0].named_parameters()]
        weights = {name: tensor_of(self.weights[name].read()) for name in names}  # which may take decoding: once
        for pass_, head in zip(self.passes, heads, strict=True):
            pass_.fill(head, weights, self.config, "head.")
        whole: dict[str, Tensor] = {}
        noise: dict[str, list[Errors]] = {}
        for start in range(0, self.truth.pack.length, self._head_tokens):
            some = slice(start, start + self._head_tokens)
            for name, exact in heads[0].per_token(xs[0][:, some]).items():  # (1, n, width)
                if name not in whole:
                    whole[name] = exact.new_empty(self.truth.pack.length, exact.shape[2])
                whole[name][some] = exact[0]
            del exact  # large
            outs = [head.per_token(x[:, some]) for head, x in zip(heads[1:], xs[1:], strict=True)]
            for name, truth in whole.items():
                rows, exact = [out[name][0] for out in outs], truth[some]  # (n, width) each
                for few in pieces(*exact.shape):
                    noise.setdefault(name, []).append(Errors.of_several([row[few] for row in rows], exact[few]))
        for name, exact in whole.items():
            self.truth.keep(name, exact, Errors.of_all(noise[name]))

    def _tap(self, name: str, xs: Sequence[Tensor]) -> None:
        if self.taps:
            self._keep(name, [x[0] for x in xs])

    def _keep(self, name: str, values: Sequence[Tensor]) -> None:
        """Record a tensor [N, width], given in all passes."""
        exact, *yardsticks = values
        self.truth.keep(name, exact, Errors.of_several(yardsticks, exact))


def _rows(table: LazyTensor, rows: Integers) -> Tensor:
    """The given rows of a table, [n, D]; reads no others."""
    import torch

    width = slice(0, table.shape[1])
    return torch.cat([tensor_of(table.read((slice(r, r + 1), width))) for r in rows.tolist()])
