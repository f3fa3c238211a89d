"""Continue several prompts in one batch with the KV cache, using only onnxruntime and tokenizers.

    python examples/decode_loop.py EXPORT PROMPT [PROMPT ...]

EXPORT is a directory that gptconvert wrote: ``onnx/model.onnx``, ``tokenizer.json`` and ``generation_config.json``.
Decoding is greedy. Prompts of different lengths are padded on the left, so that the last token of every row is in the
last column and one decode step serves the whole batch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime reads it when it is imported

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

NEW_TOKENS = 24


def pad_left(rows: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, int64 [B, S]; the mask is 0 at padding."""
    length = max(map(len, rows))
    ids = np.array([[pad] * (length - len(row)) + row for row in rows], np.int64)
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int64)
    return ids, mask


def decode(
    session: onnxruntime.InferenceSession, ids: np.ndarray, mask: np.ndarray, stops: list[int], new_tokens: int
) -> np.ndarray:
    """Greedy continuation of a left-padded batch, [B, at most new_tokens]; ended rows are filled with ``stops[0]``.

    Args:
        session: graph with KV cache.
        ids: prompts, [B, S].
        mask: 0 at padding, [B, S].
        stops: tokens that end a row; empty: rows do not end.
        new_tokens: upper bound. The longest prompt and these must fit the model's context.
    """
    names = [output.name for output in session.get_outputs()]  # logits, present.0.key, present.0.value, …
    cache = {  # [B, H, P, D] per layer, for key and value; P, the number of cached tokens, starts at 0
        item.name: np.zeros((len(ids), item.shape[1], 0, item.shape[3]), np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past_key_values.")
    }
    ended = np.zeros(len(ids), bool)
    positions = (mask.cumsum(1) - 1).clip(0)  # of real tokens; any valid position serves at padding
    written = []
    for _ in range(new_tokens):
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        outputs = dict(zip(names, session.run(names, {**feed, **cache}), strict=True))
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        chosen = outputs["logits"][:, -1].argmax(-1)  # [B]: left-padded rows end in the last column
        if stops:
            chosen[ended] = stops[0]
            ended |= np.isin(chosen, stops)
        written.append(chosen)
        if ended.all():
            break
        ids = chosen[:, None]  # one token per row from now on; the mask covers cached and new tokens
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        positions = positions[:, -1:] + 1
    return np.stack(written, axis=1)


def main(directory: str, *prompts: str, new_tokens: int = NEW_TOKENS) -> list[str]:
    """Print and return every prompt with its continuation."""
    tokenizer = Tokenizer.from_file(str(Path(directory, "tokenizer.json")))
    end = json.loads(Path(directory, "generation_config.json").read_text()).get("eos_token_id")
    stops = end if isinstance(end, list) else [] if end is None else [end]
    session = onnxruntime.InferenceSession(Path(directory, "onnx/model.onnx"), providers=["CPUExecutionProvider"])
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    ids, mask = pad_left(rows, pad=stops[0] if stops else 0)
    written = decode(session, ids, mask, stops, new_tokens)
    texts = [tokenizer.decode([*row, *new]) for row, new in zip(rows, written.tolist(), strict=True)]
    print("\n".join(texts))
    return texts


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
