"""Write a model for LiteRT-LM, Google's runtime for language models on phones, and run it.

    python examples/litertlm.py CHECKPOINT MODEL.litertlm PROMPT

It needs TensorFlow and ``pip install litert-lm-builder litert-lm-api``. LiteRT-LM needs other graphs than
``--to tflite`` writes: one for prompts and one for a single token, with a cache of fixed size that each run returns.
They are built here from the functions of the SavedModel's graph. This is an example, not a target, because the
builder puts a random id and the time into every file, and nothing proves the file but the text that it generates.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import tensorflow as tf

from gptconvert import open_checkpoint
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.targets.package.tokenizer import tokenizer_files
from gptconvert.targets.saved_model.graph import Weights, block, embedding, per_token, rotary_angles
from reference_model.config import GPTConfig

#: Tokens that one run of the prompt's graph takes; longer prompts take several, shorter ones are padded.
PREFILL = 64
NEW_TOKENS = 24


def step(w: Weights, config: GPTConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Logits [1, N, V] of N tokens at consecutive places, and the caches with their keys and values.

    Tokens of padding follow the real ones: their keys are overwritten before any token sees them.
    """
    tokens, start = inputs["tokens"], inputs["input_pos"][0]  # (1, N)
    new, context = tokens.shape[1], config.n_ctx
    place = start + tf.range(new)  # (N)
    positions = tf.minimum(place, context - 1)[tf.newaxis]  # (1, N)
    x = embedding(w, config, tokens, positions)  # (N, D)
    angles = rotary_angles(config.rotary, positions) if config.rotary and config.rotary.dim else None
    biases = {window: visible(start, new, context, window) for window in dict.fromkeys(config.attn_window)}
    slots = tf.range(context)  # (C)
    written = ((slots >= start) & (slots < start + new))[:, tf.newaxis]  # (C, 1)
    chosen = tf.one_hot(slots - start, new)  # (C, N)
    outputs = {}
    for i in range(config.n_layer):
        cache = {part: inputs[f"kv_cache_{part}_{i}"] for part in "kv"}  # (1, H, C, d) each
        past = cache["k"], cache["v"]
        x, present = block(w, config, i, x, biases[config.attn_window[i]], angles, past)  # (N, D)
        for part, values in zip("kv", present, strict=True):
            placed = tf.matmul(chosen, values[:, :, context:])  # (1, H, C, d)
            outputs[f"kv_cache_{part}_{i}"] = tf.where(written, placed, cache[part])
    return {"logits": per_token(w, config, x)["logits"][tf.newaxis], **outputs}


def visible(start: Any, new: int, context: int, window: int | None) -> Any:
    """Bias [1, 1, N, C + N]: a token sees the cache before ``start``, and the new tokens up to itself."""
    key = tf.concat((tf.range(context), start + tf.range(new)), 0)  # (C + N)
    query = (start + tf.range(new))[:, tf.newaxis]  # (N, 1)
    fresh = tf.range(context + new) >= context  # (C + N)
    seen = (key <= query) & (fresh | (key < start))  # (N, C + N)
    if window is not None:
        seen = seen & (query - key < window)
    return tf.where(seen, 0.0, tf.float32.min)[tf.newaxis, tf.newaxis]


def tflite(checkpoint: Checkpoint) -> bytes:
    """The graphs ``prefill`` and ``decode`` as one LiteRT file."""
    config = checkpoint.config
    variables = {n: tf.Variable(np.asarray(w.read(), np.float32), name=n) for n, w in checkpoint.weights.items()}
    weights = Weights(variables, {name: value.shape for name, value in variables.items()}, frozenset())
    cache = tf.TensorSpec((1, config.n_head, config.n_ctx, config.head_dim), tf.float32)
    module = tf.Module()
    module.weights = variables

    def traced(new: int, keep: Callable[[str], bool]) -> Any:
        specs = {"tokens": tf.TensorSpec((1, new), tf.int32), "input_pos": tf.TensorSpec((new,), tf.int32)}
        specs |= {f"kv_cache_{part}_{i}": cache for i in range(config.n_layer) for part in "kv"}
        named = {name: tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in specs.items()}

        def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in step(weights, config, inputs).items() if keep(name)}

        return tf.function(run, input_signature=[named], autograph=False).get_concrete_function()

    signatures = {"prefill": traced(PREFILL, lambda name: name != "logits"), "decode": traced(1, lambda _: True)}
    with tempfile.TemporaryDirectory() as directory:
        tf.saved_model.save(module, directory, signatures=signatures)
        converter = tf.lite.TFLiteConverter.from_saved_model(directory, signature_keys=list(signatures))
        return bytes(converter.convert())


def bundle(checkpoint: Checkpoint, path: str) -> None:
    """Write the LiteRT-LM file: graphs, tokenizer and metadata."""
    from litert_lm_builder import LitertLmFileBuilder, Metadata, TfLiteModelType
    from litert_lm_builder.litertlm_builder import DType
    from litert_lm_builder.runtime.proto.llm_metadata_pb2 import LlmMetadata

    metadata = LlmMetadata(max_num_tokens=checkpoint.config.n_ctx, supports_thinking=False)
    metadata.supports_function_calling = False
    metadata.llm_model_type.generic_model.SetInParent()
    for end in checkpoint.special_ids.eos:
        metadata.stop_tokens.add().token_ids.ids.append(end)
    with tempfile.TemporaryDirectory() as directory:
        parts = {"model.tflite": tflite(checkpoint), "metadata.pb": metadata.SerializeToString()}
        parts["tokenizer.json"] = tokenizer_files(checkpoint)[0]["tokenizer.json"]
        for name, content in parts.items():
            (Path(directory) / name).write_bytes(content)
        builder = LitertLmFileBuilder()
        builder.add_system_metadata(Metadata("Authors", "gptconvert", DType.STRING))
        builder.add_llm_metadata(f"{directory}/metadata.pb")
        builder.add_hf_tokenizer(f"{directory}/tokenizer.json")
        builder.add_tflite_model(f"{directory}/model.tflite", TfLiteModelType.PREFILL_DECODE)
        with open(path, "wb") as file:
            builder.build(file)


def continuation(path: str, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    """The text that LiteRT-LM writes after a prompt, greedily."""
    import litert_lm

    with (
        litert_lm.Engine(path) as engine,
        engine.create_session(
            apply_prompt_template=False,
            sampler_config=litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0),
            max_output_tokens=new_tokens,
        ) as session,
    ):
        session.run_prefill([prompt])
        return str(session.run_decode().texts[0])


def main(source: str, path: str, prompt: str) -> str:
    """Convert, run and print; returns the continuation."""
    bundle(open_checkpoint(source), path)
    text = continuation(path, prompt)
    print(f"{prompt}{text}")
    return text


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
