"""llama.cpp as a peer: a GGUF file of the benchmark's GPT-2 by ``gguf``, run by the prebuilt wheel ``xllamacpp``.

Neither package is needed by gptconvert: ``pip install gguf xllamacpp``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.pipeline import open_checkpoint

#: Types of the file → types of the matrices, and of the token embedding, which is the head too. ``gguf`` cannot write
#: Q6_K, llama.cpp's usual choice for the head of a 4-bit file.
TYPES = {"F32": ("F32", "F32"), "Q8_0": ("Q8_0", "Q8_0"), "Q4_0": ("Q4_0", "Q8_0")}
PACKAGES = ("gguf", "xllamacpp")
#: Canonical name within a block → GGUF's.
BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TOP = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def gguf_file(source: Path, kind: str, root: Path) -> Path:
    """The checkpoint ``source`` as a GGUF file of type ``kind``, created on first use."""
    path = root / f"{source.name}-{kind}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        _write(open_checkpoint(str(source)), kind, partial)
        partial.replace(path)
    return path


def _write(checkpoint: Checkpoint, kind: str, path: Path) -> None:
    import gguf

    config, writer = checkpoint.config, gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.norm_eps)
    # Only ids are passed, but llama.cpp does not load a model without a vocabulary.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(config.vocab_size - 1)
    writer.add_eos_token_id(config.vocab_size - 1)
    writer.add_add_bos_token(False)
    for name, weight in checkpoint.weights.items():
        array = np.ascontiguousarray(weight.read(), np.float32)  # [out, in]
        stored = getattr(gguf.GGMLQuantizationType, _type_of(name, array, kind))
        data = array if stored == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(array, stored)
        writer.add_tensor(_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type_of(name: str, array: np.ndarray, kind: str) -> str:
    matrices, embedding = TYPES[kind]
    if array.ndim < 2 or name == "wpe.weight":
        return "F32"
    if array.shape[-1] % 32:  # the models of tests, which blocks of 32 do not fit
        return "F32"
    return embedding if name == "wte.weight" else matrices


def _name(canonical: str) -> str:
    module, _, kind = canonical.rpartition(".")
    if not module.startswith("h."):
        return f"{TOP[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"blk.{layer}.{BLOCK[inner]}.{kind}"


class Llama:
    """A GGUF file in llama.cpp's server, in this process, on ``threads`` threads."""

    def __init__(self, path: Path, threads: int) -> None:
        import xllamacpp

        given = xllamacpp.CommonParams()
        given.model.path, given.n_ctx, given.n_parallel, given.verbosity = str(path), 1024, 1, -1
        given.n_batch = given.n_ubatch = 512
        for pool in (given.cpuparams, given.cpuparams_batch):
            pool.n_threads = threads
        self.server = xllamacpp.Server(given)

    def step(self, past: int, new: int) -> Callable[[], object]:
        """Evaluates ``new`` tokens: of a prompt if ``past`` is 0, else one by one after ``past`` cached tokens."""
        ids = np.random.default_rng(0).integers(0, 50256, past or new).tolist()
        # The last token of a cached prompt is evaluated again, so N predictions take N passes.
        asked: dict[str, Any] = {"prompt": ids, "n_predict": new if past else 1, "cache_prompt": past > 0}
        return lambda: self.server.handle_completions({**asked, "temperature": 0, "ignore_eos": True})
