"""Configuration files beside the weights, for transformers, optimum, transformers.js and onnxruntime-genai.

All of them read ``config.json``. transformers, optimum and transformers.js read ``generation_config.json`` and the
tokenizer files. onnxruntime-genai reads ``genai_config.json``; every family uses its generic ``decoder`` type, with
one tensor per key and value, since its only GPT type, ``gpt2``, expects a combined cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gptconvert.containers.json import dump_json
from gptconvert.containers.untrusted import read_small
from gptconvert.families.registry import family_named
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import holding_all
from gptconvert.model.export import Export, PlannedFile
from gptconvert.model.generation import GENERATION_CONFIG
from gptconvert.model.options import Options
from gptconvert.sources.documents import MAX_LICENCE, is_licence
from gptconvert.targets.package.tokenizer import end_token_id, tokenizer_files

#: Keys about the origin of a file, and keys that are written anew.
NOT_CARRIED = frozenset(
    """transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash transformers.js_config
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal""".split()
)
#: The target whose graphs config.json and genai_config.json name.
ONNX = "onnx"
#: Written if no graph has a cache, which optimum's ``generate`` would request. transformers' ``generate`` reads only
#: generation_config.json.
UNCACHED: Mapping[str, object] = {"use_cache": False}
#: Graph file → its dtype in transformers.js, which has none for bfloat16. The default is the first that exists: the
#: smallest without a visible loss, then what every device runs; fp16 needs ``shader-f16`` on WebGPU.
JS_DTYPE: Mapping[str, str] = {
    "model_quantized.onnx": "q8",
    "model.onnx": "fp32",
    "model_q4.onnx": "q4",
    "model_fp16.onnx": "fp16",
}
#: Name of the graph that computes in float16, which onnxruntime-genai runs on the CPU only by casting.
HALF = "fp16"


def sidecar_files(
    exports: Sequence[Export],
    options: Options,
    tokenizer: Mapping[str, bytes] | None = None,
) -> tuple[PlannedFile, ...]:
    """The configuration and tokenizer files of an output directory.

    Args:
        exports: the planned exports, at least one.
        options: the options of the conversion.
        tokenizer: file name → bytes, as returned by :func:`tokenizer_files`; None to compute it here.

    Raises:
        InputError: a tokenizer file is corrupt.
    """
    checkpoint = exports[0].checkpoint
    tokenizer = tokenizer_files(checkpoint)[0] if tokenizer is None else tokenizer
    # Graphs that share the data of another are for callers that know them by name.
    graphs = {export.path: len(export.files) > 1 for export in exports if export.target == ONNX and not export.shared}
    in_place = next((e.path for e in exports if e.target == ONNX and e.variant.endswith("in_place")), None)
    generates = checkpoint.config.task == "text-generation"
    uncached = bool(graphs) and generates and options.kv_cache is False
    files = {"config.json": dump_json({**config_json(checkpoint, graphs), **(UNCACHED if uncached else {})})}
    if generates or GENERATION_CONFIG in checkpoint.source.tokenizer:
        alone = uncached and all(export.target == ONNX for export in exports)
        files[GENERATION_CONFIG] = dump_json({**checkpoint.generation, **(UNCACHED if alone else {})})
    if graphs and generates and not uncached:
        graph = in_place or _for_genai(exports, options)
        files["genai_config.json"] = dump_json(genai_config(checkpoint, graph, in_place is not None))
    files |= {**licence_files(checkpoint), **tokenizer}
    return tuple(PlannedFile.of_bytes(path, data) for path, data in sorted(files.items()))


def _for_genai(exports: Sequence[Export], options: Options) -> str:
    """The graph for onnxruntime-genai: the first that computes in float32, if there is one."""
    graphs = [export for export in exports if export.target == ONNX and not export.shared]
    wide = [export for export in graphs if not (export.variant == HALF and HALF in options.quantize)]
    return (wide or graphs)[0].path


def licence_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The source's licence files, unchanged: file name → bytes."""
    found = {name: path for name, path in checkpoint.source.documents.items() if is_licence(name)}
    return {name: read_small(path, MAX_LICENCE, "a licence") for name, path in found.items()}


def with_special_ids(checkpoint: Checkpoint, tokenizer: Mapping[str, bytes] | None = None) -> Checkpoint:
    """The checkpoint with the tokenizer's end-of-text id, unless a configuration file states one.

    OpenAI's hparams.json has no special ids. The family defaults to the last id of the vocabulary, which is right for
    OpenAI's vocabularies but wrong for padded ones.

    Args:
        checkpoint: as opened.
        tokenizer: from :func:`tokenizer_files`; None to compute it if it is needed.
    """
    own = checkpoint.generation if GENERATION_CONFIG in checkpoint.source.tokenizer else None
    if "eos_token_id" in {**checkpoint.source.config, **(own or {})}:
        return checkpoint
    tokenizer = tokenizer_files(checkpoint)[0] if tokenizer is None else tokenizer
    end = end_token_id(checkpoint, tokenizer)
    if end is None or end >= checkpoint.config.vocab_size:
        return checkpoint
    ids = {"bos_token_id": end, "eos_token_id": end}
    return replace(
        checkpoint,
        carried={**checkpoint.carried, **ids},
        generation={**checkpoint.generation, **ids} if own is None else own,
        special_ids=replace(checkpoint.special_ids, bos=end, eos=(end,)),
    )


def config_json(checkpoint: Checkpoint, graphs: Mapping[str, bool]) -> dict[str, object]:
    """config.json: the architecture under transformers' names, and the keys carried over from the source."""
    carried = {key: value for key, value in checkpoint.carried.items() if key not in NOT_CARRIED}
    written = family_named(checkpoint.config.family).write_config(checkpoint.config, carried)
    return {**written, "dtype": _dtype_name(checkpoint), **transformers_js_config(graphs)}


def transformers_js_config(graphs: Mapping[str, bool]) -> dict[str, object]:
    """The key that transformers.js reads: a dtype that exists (in browsers, the default is q8), and external data."""
    files = {path.rpartition("/")[2]: has_data for path, has_data in graphs.items()}
    hint: dict[str, object] = {}
    if (default := browser_graph(graphs)) is not None:
        hint["dtype"] = JS_DTYPE[default.rpartition("/")[2]]
    if external := {file: True for file, has_data in files.items() if has_data}:
        hint["use_external_data_format"] = external
    return {"transformers.js_config": hint} if hint else {}


def browser_graph(graphs: Iterable[str]) -> str | None:
    """The graph that transformers.js loads by default; None if it cannot load any."""
    files = {path.rpartition("/")[2]: path for path in graphs}
    return next((files[file] for file in JS_DTYPE if file in files), None)


def genai_config(checkpoint: Checkpoint, graph: str, in_place: bool = False) -> dict[str, object]:
    """genai_config.json for onnxruntime-genai: the ONNX graph's names, and a cache that grows or stays in place."""
    config, special = checkpoint.config, checkpoint.special_ids
    ids = special.as_json()
    if special.eos:
        ids.setdefault("pad_token_id", special.eos[0])
    names = ("input_ids", "attention_mask", "position_ids")
    decoder = {
        "filename": graph,
        "head_size": config.head_dim,
        "hidden_size": config.n_embd,
        "inputs": {
            **{name: name for name in names},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "num_key_value_heads": config.n_head,
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
    }
    model = {
        **ids,
        "type": "decoder",
        "context_length": config.n_ctx,
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": config.n_ctx, "num_beams": 1, "past_present_share_buffer": in_place}
    return {"model": model, "search": search}


def _dtype_name(checkpoint: Checkpoint) -> str:
    """The dtype in which transformers loads the weights: the smallest that represents every weight exactly."""
    return holding_all(weight.dtype for weight in checkpoint.weights.values()).name
