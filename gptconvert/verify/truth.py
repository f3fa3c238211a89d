"""The truth: what a checkpoint computes on the probes, in float64, one block of the model in memory at a time.

All tokens of all probes lie side by side in one sequence of N tokens, so that each weight is read once and each
linear layer is one large product; which token sees which key is said by the mask, block by diagonal block. The
same pass runs the yardstick, the reference model in the candidate's computing type, and keeps of it only how far it
strays from the truth.

Shapes: N tokens, P past tokens of all probes together, V, D, H, hd as in ``reference_model/config.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gptconvert.checkpoint import Checkpoint
from gptconvert.errors import InputError
from gptconvert.tensors import BFLOAT16, Array, Box, LazyTensor
from gptconvert.verify.metrics import Errors
from gptconvert.verify.packing import Pack, Part
from gptconvert.verify.probes import Integers, Probe
from reference_model.config import GPTConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reference_model.model import Attend, KeyValue

#: Bytes, in float64, of the largest part of the vocabulary projected at once.
HEAD_BYTES = 64 << 20


@dataclass(eq=False)
class Truth:
    """What the checkpoint computes.

    Attributes:
        pack: which token is which.
        values: tensor name → float64 [N, width]: the task's outputs for every token, ``present.{i}.key`` and
            ``.value`` (heads side by side), and with taps ``embedding`` and ``h.{i}``.
        noise: tensor name → how far the yardstick is off.
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
                tensor=name,
                hint="a weight is damaged, or a half-precision type has overflowed: try --dtype fp32",
            )
        self.values[name], self.noise[name] = exact, noise


class Lane:
    """The model in one type.

    Args:
        dtype: which.
        buffers: memory that every block's weights pass through, in one lane after the other.
    """

    def __init__(self, dtype: torch.dtype, buffers: dict[str, Tensor]) -> None:
        self.dtype, self.buffers = dtype, buffers
        self.pasts: dict[Part, KeyValue] = {}  # those that are the same in every layer

    def reader(self, stored: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
        """Name → weight in this lane's type; valid until any lane's next reader is used (buffers are shared)."""
        return lambda name: self._typed(re.sub(r"^h\.\d+", "h", name), stored[name])

    def _typed(self, key: str, stored: Tensor) -> Tensor:
        import torch

        if stored.dtype == self.dtype:
            return stored
        nbytes = stored.numel() * self.dtype.itemsize
        memory = self.buffers.get(key)
        if memory is None or len(memory) < nbytes:
            memory = self.buffers[key] = torch.empty(nbytes, dtype=torch.uint8)
        flat = memory[:nbytes].view(self.dtype)
        # As a transposed weight lies in its file: to turn it over here would cost more than the product with it.
        dense = flat.view(stored.shape) if stored.is_contiguous() else flat.view(stored.T.shape).T
        return dense.copy_(stored)


def _trim_heap() -> None:
    """Give freed memory back. Small tensors that stay on (errors, outputs) keep glibc's heap from shrinking itself,
    and every block would leave some of its temporaries behind.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def tensor_of(array: Array) -> Tensor:
    """A torch view of an array, which may be read-only: it is never written to."""
    import torch

    if array.dtype == BFLOAT16:
        return tensor_of(array.view(np.int16)).view(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


class TruthPass:
    """One run of all blocks over one pack.

    Args:
        checkpoint: weights as stored in the candidate.
        probes: what to run.
        compute: the candidate's computing type (``float32``, ``float16``).
        presents: whether the candidate returns keys and values.
        taps: whether to keep every block's output.
    """

    def __init__(
        self, checkpoint: Checkpoint, probes: Sequence[Probe], compute: str, *, presents: bool, taps: bool = False
    ) -> None:
        import torch

        self.config, self.weights = checkpoint.config, checkpoint.weights
        buffers: dict[str, Tensor] = {}
        self.lanes = (Lane(torch.float64, buffers), Lane(getattr(torch, compute), buffers))
        self.taps = taps
        windowed = any(window is not None for window in self.config.attn_window)
        self.truth = Truth(Pack(probes, windowed=windowed), {}, {})
        layers = self.config.n_layer if presents and any(probe.compare_presents for probe in probes) else 0
        # In one piece: small tensors that live long would keep the heap from ever shrinking between blocks.
        self.cache = torch.empty(layers, 2, self.truth.pack.length, self.config.n_embd, dtype=torch.float64)

    def run(self, advance: Callable[[int], None] | None = None) -> Truth:
        """The truth. ``advance`` is told how many layers more are done."""
        import torch

        with torch.no_grad():
            parts, windows = self.truth.pack.parts, self.config.attn_window
            seen = {window: [part.seen(window) for part in parts] for window in set(windows)}
            xs = self._embedding()
            for i in range(self.config.n_layer):
                xs = self._block(i, xs, seen[windows[i]])
                if advance is not None:
                    advance(1)
            for lane in self.lanes:
                lane.buffers.clear()  # a block's weights; the head needs room for its own
            self._head(xs)
        return self.truth

    def _embedding(self) -> list[Tensor]:
        """[1, N, D] in each lane. Only the rows of the tables that are asked for are read."""
        import torch

        from reference_model.model import Embedding, fill

        pack = self.truth.pack
        ids, token = np.unique(pack.ids, return_inverse=True)
        positions, position = np.unique(pack.positions, return_inverse=True)
        taken = {"wte.weight": ids, "wpe.weight": positions}
        tables = {name: _rows(self.weights[name], rows) for name, rows in taken.items() if name in self.weights}
        small = dataclasses.replace(self.config, vocab_size=len(ids), n_ctx=len(positions))
        xs = []
        for lane in self.lanes:
            embedding = Embedding(small)  # so small that a meta device would only cost the import of its kernels
            fill(embedding, lane.reader(tables), small, "embedding.")
            xs.append(embedding(torch.from_numpy(token[None]), torch.from_numpy(position[None])))  # (1, N, D)
        self._tap("embedding", xs)
        return xs

    def _block(self, i: int, xs: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
        """One block in both lanes: [1, N, D] → [1, N, D]; keys and values are recorded. ``seen`` is by part."""
        import torch

        from reference_model.model import Block, fill

        prefix = f"h.{i}."
        stored = {name: tensor_of(w.read()) for name, w in self.weights.items() if name.startswith(prefix)}
        outs, caches = [], []
        for lane, x in zip(self.lanes, xs, strict=True):
            with torch.device("meta"):
                block = Block(self.config, i)
            fill(block, lane.reader(stored), self.config, prefix)
            block.attn.attend = self._in_parts(seen, self._pasts(lane, i))
            out, present = block(x, seen[0], self._angles(lane))
            outs.append(out)
            caches.append([cache[0].transpose(0, 1).flatten(1) for cache in present])  # (N, D) each
        for part, name in enumerate(("key", "value") if len(self.cache) else ()):
            exact, yardstick = (cache[part] for cache in caches)
            self._keep(f"present.{i}.{name}", [self.cache[i, part].copy_(exact), yardstick])
        self._tap(f"h.{i}", outs)
        del stored, caches  # what is freed after the trim would stay until the next block's
        _trim_heap()
        return outs

    def _angles(self, lane: Lane) -> KeyValue | None:
        """For rotary positions, [1, 1, N, dim] each."""
        import torch

        from reference_model.model import rotary_angles

        rotary, positions = self.config.rotary, torch.from_numpy(self.truth.pack.positions[None])
        return None if rotary is None else rotary_angles(rotary, positions, lane.dtype)

    def _pasts(self, lane: Lane, layer: int) -> list[KeyValue | None]:
        """Each part's past keys and values, [1, H, p, hd] each."""
        compute, pasts = self.lanes[1].dtype, []
        for part in self.truth.pack.parts:
            past = lane.pasts.get(part) or part.past(layer, self.config)
            if past is not None and part not in lane.pasts:
                # The past is what the candidate gets: rounded to its type, then exact.
                past = past[0].to(compute).to(lane.dtype), past[1].to(compute).to(lane.dtype)
                if part.same_past_everywhere:
                    lane.pasts[part] = past
            pasts.append(past)
        return pasts

    def _in_parts(self, seen: list[Tensor], pasts: list[KeyValue | None]) -> Attend:
        """``reference_model.model.attend`` on every part: [1, H, N, hd] x 3 → [1, H, N, hd] and the new k and v."""
        import torch

        from reference_model.model import attend

        parts = self.truth.pack.parts

        def in_parts(q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: KeyValue | None) -> tuple[Tensor, KeyValue]:
            mixed = torch.empty_like(q)
            for part, sees, past in zip(parts, seen, pasts, strict=True):
                tokens = torch.from_numpy(part.tokens)
                own_q, own_k, own_v = (x[:, :, tokens] for x in (q, k, v))  # (1, H, n, hd) each
                mixed[:, :, tokens], _present = attend(own_q, own_k, own_v, sees, past)
            return mixed, (k, v)

        return in_parts

    def _head(self, xs: list[Tensor]) -> None:
        """The task's outputs for every token, a part of the vocabulary at a time."""
        import torch

        pack, config = self.truth.pack, self.config
        whole = torch.empty(pack.length, config.vocab_size if config.has_lm_head else 0, dtype=torch.float64)
        parts = _vocabulary_parts(config)
        for number, part in enumerate(parts):
            lanes = self._head_part(xs, part)
            for name in lanes[0]:
                exact, noise = lanes[0][name][0], Errors.of(lanes[1][name][0], lanes[0][name][0])  # (N, width)
                if config.has_lm_head and name == "logits":
                    whole[:, part] = exact
                    self.truth.noise[name] = noise.joined(self.truth.noise[name]) if number else noise
                elif not number:
                    self.truth.keep(name, exact, noise)
        if config.has_lm_head:
            self.truth.keep("logits", whole, self.truth.noise["logits"])

    def _head_part(self, xs: list[Tensor], part: slice) -> list[dict[str, Tensor]]:
        """Outputs by name, [1, N, width], in both lanes; logits for the ids ``part`` alone."""
        import torch

        from reference_model.model import Head, canonical_name, fill

        small = dataclasses.replace(self.config, vocab_size=part.stop - part.start)
        with torch.device("meta"):
            names = [canonical_name(f"head.{name}", self.config) for name, _ in Head(small).named_parameters()]
        stored = {name: tensor_of(self.weights[name].read(self._box(name, part))) for name in names}
        outs = []
        for lane, x in zip(self.lanes, xs, strict=True):
            with torch.device("meta"):
                head = Head(small)
            fill(head, lane.reader(stored), small, "head.")
            outs.append(head.per_token(x))
        return outs

    def _box(self, name: str, part: slice) -> Box:
        """What the head reads of a weight: of one with a row for each id only ``part``, of others everything."""
        per_id = name in ("wte.weight", "lm_head.weight", "lm_head.bias")
        whole = tuple(slice(0, size) for size in self.weights[name].shape)
        return (part, *whole[1:]) if per_id else whole

    def _tap(self, name: str, xs: Sequence[Tensor]) -> None:
        if self.taps:
            self._keep(name, [x[0] for x in xs])

    def _keep(self, name: str, lanes: Sequence[Tensor]) -> None:
        exact, yardstick = lanes
        self.truth.keep(name, exact, Errors.of(yardstick, exact))


def _rows(table: LazyTensor, rows: Integers) -> Tensor:
    """The given rows of a table [n, D], without reading the rest."""
    import torch

    width = slice(0, table.shape[1])
    return torch.cat([tensor_of(table.read((slice(r, r + 1), width))) for r in rows.tolist()])


def _vocabulary_parts(config: GPTConfig) -> list[slice]:
    """The vocabulary in parts whose float64 weights stay small; in one part for tasks without a projection to it."""
    step = max(1, HEAD_BYTES // (8 * config.n_embd)) if config.has_lm_head else config.vocab_size
    return [slice(v, min(v + step, config.vocab_size)) for v in range(0, config.vocab_size, step)]
