"""The llama.cpp process. Started by :mod:`.process`, never imported."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import xllamacpp

from gptconvert.targets.child.frames import Arrays
from gptconvert.targets.child.server import Command, serve

#: The loaded model.
SERVERS: list[Any] = []
#: Only errors are logged.
VERBOSITY = 1
#: Tokens that are evaluated at once, llama.cpp's default.
BATCH = 512

Answer = tuple[Mapping[str, object], Arrays]


def load(request: Mapping[str, Any], _: Arrays) -> Answer:
    """Load the model at ``path``: on the CPU, attention without approximations, float32 keys and values."""
    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.n_parallel = request["path"], request["n_ctx"], 1
    given.n_batch = given.n_ubatch = BATCH
    given.n_gpu_layers, given.verbosity, given.warmup = 0, VERBOSITY, False
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    given.no_extra_bufts = not request["repack"]
    for pool in (given.cpuparams, given.cpuparams_batch):
        pool.n_threads = request["threads"]
    given.api_keys = [secrets.token_hex(16)]
    if sys.platform == "linux":
        given.hostnames = [f"@gptconvert-{secrets.token_hex(8)}.sock"]
    SERVERS[:] = [xllamacpp.Server(given)]
    return {}, {}


def predict(request: Mapping[str, Any], _: Arrays) -> Answer:
    """The most likely tokens after ``prompt``, token ids or text, and their log-probabilities, ``most`` of each."""
    answer = SERVERS[0].handle_completions(
        {
            "prompt": request["prompt"],
            "n_predict": 1,
            "logprobs": request["most"],
            "temperature": 0,
            "cache_prompt": request["cached"],
            "ignore_eos": True,
        }
    )
    if "error" in answer:
        raise RuntimeError(str(answer["error"].get("message", answer["error"])))
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    ids, values = ([each[key] for each in found] for key in ("id", "logprob"))
    return {}, {"ids": np.array(ids, np.int64), "log_probabilities": np.array(values, np.float32)}


COMMANDS: Mapping[str, Command] = {"load": load, "predict": predict}


if __name__ == "__main__":
    serve(COMMANDS, f"llama.cpp {getattr(xllamacpp, '__version__', '')}".strip())
