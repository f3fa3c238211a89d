"""Random checkpoints at the real shapes, in OpenAI's format. Real weights cannot be had offline; sizes can."""

from __future__ import annotations

import json
import os
from pathlib import Path

import google_crc32c
import numpy as np

from gptconvert.families.base import Request
from gptconvert.families.gpt2 import OPENAI_TF, _openai_config
from gptconvert.mapping import expand
from gptconvert.targets.tf_index import Entry, bundle_index

#: size → hparams, as OpenAI's downloads state them.
SIZES = {
    "124M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "355M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24},
    "774M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1280, "n_head": 20, "n_layer": 36},
    "1558M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48},
}
BLOCK = 1 << 22


def openai_checkpoint(size: str, root: Path) -> Path:
    """A checkpoint directory of ``size``, made once, with weights spread as GPT-2's initialisation spreads them."""
    directory = root / size
    if (directory / "model.ckpt.index").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    hparams = SIZES[size]
    config, _, _ = _openai_config(dict(hparams), None, {}, Request())
    shapes = {bound.theirs[0]: bound.shape for bound in expand(OPENAI_TF.rows, config)}
    random, entries, offset = np.random.default_rng(0), [], 0
    with open(directory / "model.ckpt.data-00000-of-00001", "wb") as file:
        for name in sorted(shapes):
            crc, count = 0, int(np.prod(shapes[name]))
            for start in range(0, count, BLOCK):
                values = random.standard_normal(min(BLOCK, count - start), dtype=np.float32) * np.float32(0.02)
                raw = (values + np.float32(name.endswith("/g"))).tobytes()
                crc = google_crc32c.extend(crc, raw)
                file.write(raw)
            entries.append(Entry(name, 1, shapes[name], offset, 4 * count, crc))
            offset += 4 * count
    (directory / "hparams.json").write_text(json.dumps(hparams, indent=2) + "\n")
    (directory / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    partial = directory / "index.partial"
    partial.write_bytes(bundle_index(entries))
    os.replace(partial, directory / "model.ckpt.index")
    return directory
