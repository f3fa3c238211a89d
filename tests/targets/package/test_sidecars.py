"""The JSON files beside the weights, loaded by the libraries that use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import transformers

from gptconvert.containers.json import dump_json
from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.export import Export, PlannedFile
from gptconvert.model.generation import SpecialIds
from gptconvert.model.options import Options
from gptconvert.targets.onnx.plan import plan
from gptconvert.targets.package.sidecars import sidecar_files, with_special_ids
from gptconvert.targets.package.tokenizer import tokenizer_files
from tests.helpers import FIXTURES, checkpoint_of, openai_checkpoint, tiny_gpt2, write_planned

ONNX = ("onnx/model.onnx", "onnx/model.onnx_data")
BOTH = ("onnx", "safetensors")
TOKENIZER = FIXTURES / "gpt2-stdlib"


def exports(
    checkpoint: Checkpoint, targets: tuple[str, ...] = BOTH, planned: tuple[str, ...] = ONNX
) -> tuple[Export, ...]:
    """One export per graph in ``planned``, and one for the other target."""
    graphs = [path for path in planned if path.endswith(".onnx")] if "onnx" in targets else []
    files = {path: [name for name in (path, f"{path}_data") if name in planned] for path in graphs}
    made = [
        Export("onnx", path, checkpoint, tuple(PlannedFile(n, 0) for n in names)) for path, names in files.items()
    ]
    return (*made, Export("safetensors", "model.safetensors", checkpoint, ()))


def written(
    checkpoint: Checkpoint,
    targets: tuple[str, ...] = BOTH,
    planned: tuple[str, ...] = ONNX,
    **options: Any,
) -> dict[str, bytes]:
    checkpoint = with_special_ids(checkpoint)
    files = sidecar_files(exports(checkpoint, targets, planned), Options(**options))
    assert [file.path for file in files] == sorted(file.path for file in files)
    assert all(not file.tensors and file.nbytes == len(file.head) for file in files)
    return {file.path: file.head for file in files}


def parsed(checkpoint: Checkpoint, name: str, **kwargs: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written(checkpoint, **kwargs)[name])
    return found


@pytest.fixture
def tiny() -> Checkpoint:
    return checkpoint_of(*tiny_gpt2())


def test_files_without_a_tokenizer(tiny: Checkpoint) -> None:
    assert set(written(tiny)) == {"config.json", "generation_config.json", "genai_config.json"}
    assert set(written(tiny, ("safetensors",), ())) == {"config.json", "generation_config.json"}
    assert set(written(tiny, ("onnx",), ONNX, kv_cache=False)) == {"config.json", "generation_config.json"}


def test_files_of_a_bare_model() -> None:
    raw, arrays = tiny_gpt2()
    bare = checkpoint_of(raw, arrays, request=Options(task="feature-extraction"))
    assert set(written(bare)) == {"config.json"}
    assert parsed(bare, "config.json")["architectures"] == ["GPT2Model"]


def test_form_is_that_of_transformers(tiny: Checkpoint) -> None:
    for data in written(tiny).values():
        text = data.decode()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"eps": float("nan")})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"activation_function": "relu", "layer_norm_epsilon": 1e-3, "n_inner": None, "pad_token_id": 3},
        {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "resid_pdrop": 0.0},
    ],
)
def test_transformers_reads_the_same_config_as_from_the_source(changes: dict[str, object], tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2(**changes)
    write_planned(tmp_path, sidecar_files(exports(checkpoint_of(raw, arrays)), Options()))
    converted = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    reference = transformers.GPT2Config(**raw).to_dict()
    for key in ("transformers.js_config", "_name_or_path", "dtype", "n_ctx"):
        converted.pop(key, None)
        reference.pop(key, None)
    assert converted == reference
    assert "transformers_version" not in json.loads((tmp_path / "config.json").read_text())


def test_a_second_conversion_changes_nothing(tiny: Checkpoint) -> None:
    first = written(tiny)
    _, arrays = tiny_gpt2()
    again = checkpoint_of(json.loads(first["config.json"]), arrays)
    assert written(again) == first


def test_keys_of_the_source_are_kept_except_its_location() -> None:
    old = {
        "_name_or_path": "/home/me/runs/7",
        "transformers_version": "4.9.0",
        "torch_dtype": "float16",
        "_commit_hash": "abc",
        "transformers.js_config": {"use_external_data_format": {"model_q4.onnx": True}},
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "id2label": {"0": "LABEL_0"},
    }
    raw, arrays = tiny_gpt2(**old)
    config = parsed(checkpoint_of(raw, arrays), "config.json", planned=())
    assert config["task_specific_params"] == old["task_specific_params"]
    assert config["id2label"] == old["id2label"]
    assert config["dtype"] == "float32"
    assert not {*old} & {*config} - {"task_specific_params", "id2label"}


def test_context_is_written_under_both_names(tiny: Checkpoint) -> None:
    config = parsed(tiny, "config.json")
    assert config["n_ctx"] == config["n_positions"] == 40


@pytest.mark.parametrize(
    ("planned", "announced"),
    [
        (ONNX, {"model.onnx": True}),
        (("onnx/model.onnx",), None),
        (
            (*ONNX, "onnx/model_q4.onnx", "onnx/model_fp16.onnx", "onnx/model_fp16.onnx_data"),
            {"model.onnx": True, "model_fp16.onnx": True},
        ),
        ((), None),
    ],
)
def test_external_data_is_announced(tiny: Checkpoint, planned: tuple[str, ...], announced: object) -> None:
    config = parsed(tiny, "config.json", planned=planned)
    found = config.get("transformers.js_config", {})
    assert found.get("use_external_data_format") == announced


@pytest.mark.parametrize(
    ("graph", "dtype"),
    [("model", "fp32"), ("model_fp16", "fp16"), ("model_quantized", "q8"), ("model_q4", "q4"), ("model_bf16", None)],
)
def test_dtype_that_exists_is_named(tiny: Checkpoint, graph: str, dtype: str | None) -> None:
    """Without it, browsers ask for q8; transformers.js has no bfloat16."""
    config = parsed(tiny, "config.json", planned=(f"onnx/{graph}.onnx",))
    assert config.get("transformers.js_config") == (dtype and {"dtype": dtype})


@pytest.mark.parametrize(
    ("graphs", "dtype"),
    [
        (("model", "model_quantized", "model_q4", "model_fp16"), "q8"),
        (("model", "model_fp16", "model_q4"), "fp32"),
        (("model_fp16", "model_q4"), "q4"),
        (("model_bf16", "model_fp16"), "fp16"),
    ],
)
def test_the_default_dtype_runs_everywhere(tiny: Checkpoint, graphs: tuple[str, ...], dtype: str) -> None:
    """In any order of the graphs: q8, fp32 or q4 if there is one, since fp16 needs ``shader-f16`` on WebGPU."""
    for order in (graphs, graphs[::-1]):
        config = parsed(tiny, "config.json", planned=tuple(f"onnx/{graph}.onnx" for graph in order))
        assert config["transformers.js_config"] == {"dtype": dtype}


@pytest.mark.parametrize(
    ("options", "graph", "shared"),
    [
        ({"quantize": ("q8", "q4")}, "model", False),
        ({"quantize": ("q8",), "in_place": True}, "model_in_place", True),
        ({"quantize": ("q8",), "in_place": True, "no_base": True}, "model_quantized_in_place", True),
        ({"quantize": ("fp16", "q4"), "no_base": True}, "model_q4", False),
        ({"quantize": ("fp16", "q4", "q8"), "no_base": True, "last_token": True}, "model_q4", False),
        ({"quantize": ("fp16",), "no_base": True}, "model_fp16", False),
        ({"dtype": "fp16", "quantize": ("q8",)}, "model_fp16", False),
    ],
    ids=str,
)
def test_genai_config_names_a_graph_that_it_runs(
    tiny: Checkpoint, options: dict[str, Any], graph: str, shared: bool
) -> None:
    """The cache in place if there is one; otherwise the first graph that computes in float32."""
    files = sidecar_files(plan(tiny, Options(**options)), Options(**options))
    found = json.loads(next(file.head for file in files if file.path == "genai_config.json"))
    assert found["model"]["decoder"]["filename"] == f"onnx/{graph}.onnx"
    assert found["search"]["past_present_share_buffer"] is shared


def test_genai_config_names_the_first_graph(tiny: Checkpoint) -> None:
    planned = ("onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_fp16.onnx_data")
    for order in (planned, planned[::-1]):
        found = parsed(tiny, "genai_config.json", planned=order)["model"]["decoder"]["filename"]
        assert found == next(path for path in order if path.endswith(".onnx"))


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        ((np.float32, np.float32), "float32"),
        ((np.float16, np.float16), "float16"),
        ((BFLOAT16, BFLOAT16), "bfloat16"),
        ((BFLOAT16, np.float16), "float32"),
        ((np.float16, np.float32), "float32"),
        ((np.float64, np.float16), "float64"),
        ((">f4", ">f4"), "float32"),
    ],
)
def test_dtype_holds_every_weight(kinds: tuple[Any, Any], name: str) -> None:
    raw, arrays = tiny_gpt2()
    mixed = {key: array.astype(kinds[n % 2]) for n, (key, array) in enumerate(arrays.items())}
    assert parsed(checkpoint_of(raw, mixed), "config.json")["dtype"] == name


def test_generation_config_loads_and_names_the_special_ids(tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2(bos_token_id=5, eos_token_id=6)
    files = sidecar_files(exports(checkpoint_of(raw, arrays), planned=()), Options())
    config = transformers.GenerationConfig.from_pretrained(write_planned(tmp_path, files))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 6, None)


def test_generation_config_of_the_source_is_kept(tmp_path: Path) -> None:
    """In full, whatever the task; its special ids take precedence."""
    own = {"eos_token_id": [96, 7], "do_sample": True, "top_k": 5, "transformers_version": "4.1.0", "later": {"a": 1}}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(own))
    raw, arrays = tiny_gpt2(pad_token_id=3)
    for task in ("text-generation", "feature-extraction"):
        checkpoint = checkpoint_of(raw, arrays, tokenizer={path.name: str(path)}, request=Options(task=task))
        assert parsed(checkpoint, "generation_config.json") == own
        assert parsed(checkpoint, "config.json")["eos_token_id"] == 96
        assert checkpoint.special_ids == SpecialIds(96, (96, 7), 3)
    for broken in ('{"top_k": ', '{"eos_token_id": "</s>"}', "[]"):
        path.write_text(broken)
        with pytest.raises(InputError) as caught:
            checkpoint_of(raw, arrays, tokenizer={path.name: str(path)})
        assert caught.value.path == str(path)


#: Files of one checkpoint: keys of config.json, and generation_config.json (None if absent).
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "plain": ({}, None),
    "in config.json": ({"do_sample": True, "top_k": 7, "temperature": 0.7, "eos_token_id": [96, 62]}, None),
    "defaults stated": ({"do_sample": False, "top_k": 50, "max_length": 20, "output_attentions": False}, None),
    "unusual": ({"bad_words_ids": [[5]], "forced_eos_token_id": 9, "min_length": 4, "use_cache": False}, None),
    "outputs": ({"output_hidden_states": True, "pad_token_id": 0}, None),
    "no end": ({"eos_token_id": [], "bos_token_id": None}, None),
    "both": ({"top_k": 7, "eos_token_id": 5}, {"eos_token_id": [96, 62], "pad_token_id": 62, "do_sample": True}),
    "from transformers": (
        {"top_k": 7},
        {"_from_model_config": True, "eos_token_id": 96, "top_p": 0.5},
    ),
    "no ids": ({}, {"temperature": 0.5, "do_sample": True}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_transformers_generates_as_from_the_source(name: str, tmp_path: Path) -> None:
    config, own = SETTINGS[name]
    raw, arrays = tiny_gpt2(**config)
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    output.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    tokenizer = {}
    if own is not None:
        tokenizer = {"generation_config.json": str(source / "generation_config.json")}
        (source / "generation_config.json").write_text(json.dumps(own))
    write_planned(output, sidecar_files(exports(checkpoint_of(raw, arrays, tokenizer=tokenizer)), Options()))
    assert settings_of(output) == settings_of(source)


def settings_of(directory: Path) -> dict[str, Any]:
    """The settings with which transformers generates: those of the files, then the defaults."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.GPT2LMHeadModel(config)
    # The step of from_pretrained that looks for generation_config.json, then for settings in config.json.
    nothing = dict.fromkeys(("generation_config", "cache_dir", "proxies", "token"))
    off = dict.fromkeys(
        ("from_auto_class", "from_pipeline", "force_download", "local_files_only", "trust_remote_code"), False
    )
    model.adjust_generation_fn(
        **nothing, **off, pretrained_model_name_or_path=str(directory), revision="main", subfolder=""
    )
    prepared, _ = model._prepare_generation_config(None)
    found: dict[str, Any] = prepared.to_dict()
    origin = ("_from_model_config", "transformers_version", "_commit_hash")
    return {k: v for k, v in found.items() if k not in origin and v is not None and v is not False and v != []}


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ({"eos_token_id": 97}, ["eos_token_id 97"]),
        ({"eos_token_id": [96, 97], "pad_token_id": -1}, ["eos_token_id 97", "pad_token_id -1"]),
        ({"bos_token_id": 5000, "decoder_start_token_id": 97}, ["bos_token_id 5000", "decoder_start_token_id 97"]),
        ({"eos_token_id": 0, "pad_token_id": 96}, []),
    ],
)
@pytest.mark.parametrize("in_own_file", [False, True])
def test_special_ids_outside_the_vocabulary_are_noted(
    ids: dict[str, Any], named: list[str], in_own_file: bool, tmp_path: Path
) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(ids))
    raw, arrays = tiny_gpt2(**({} if in_own_file else ids))
    checkpoint = checkpoint_of(raw, arrays, tokenizer={path.name: str(path)} if in_own_file else {})
    assert sorted(note.partition(" is outside the vocabulary")[0] for note in checkpoint.notes) == named


@pytest.mark.parametrize("targets", [("onnx",), BOTH])
def test_graphs_without_a_cache_switch_it_off(targets: tuple[str, ...], tiny: Checkpoint) -> None:
    """transformers' generate reads generation_config.json, so the safetensors model keeps its cache."""
    planned = [export for export in exports(tiny, targets) if export.target in targets]
    files = {f.path: json.loads(f.head) for f in sidecar_files(planned, Options(targets=targets, kv_cache=False))}
    assert files["config.json"]["use_cache"] is False
    assert ("use_cache" in files["generation_config.json"]) is ("safetensors" not in targets)
    assert parsed(tiny, "config.json")["use_cache"] is True


def test_genai_config(tiny: Checkpoint) -> None:
    config = parsed(tiny, "genai_config.json")
    model, decoder = config["model"], config["model"]["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("decoder", 97, 40)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (96, 96, 96)
    assert decoder["filename"] == "onnx/model.onnx"
    assert (decoder["num_attention_heads"], decoder["head_size"], decoder["num_hidden_layers"]) == (3, 8, 2)
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"
    assert config["search"]["past_present_share_buffer"] is False
    assert config["search"]["max_length"] == 40


def test_genai_config_keeps_a_distinct_pad_token() -> None:
    raw, arrays = tiny_gpt2(pad_token_id=4)
    assert parsed(checkpoint_of(raw, arrays), "genai_config.json")["model"]["pad_token_id"] == 4


def test_genai_config_has_the_ids_of_generation_config(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"bos_token_id": 3, "eos_token_id": [96, 62]}')
    checkpoint = checkpoint_of(*tiny_gpt2(), tokenizer={path.name: str(path)})
    model = parsed(checkpoint, "genai_config.json")["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (3, [96, 62], 96)


def test_genai_config_names_the_inputs_and_outputs_of_the_graph(tiny: Checkpoint) -> None:
    """genai_config.json names exactly the inputs and outputs of the planned ONNX graph."""
    files = plan(tiny, Options())[0].files
    graph = onnx.load_model_from_string(next(file.head for file in files if file.path.endswith(".onnx"))).graph
    config = parsed(tiny, "genai_config.json", planned=tuple(file.path for file in files))
    decoder = config["model"]["decoder"]
    for side, values in (("inputs", graph.input), ("outputs", graph.output)):
        named = {name % i if "%d" in name else name for name in decoder[side].values() for i in range(2)}
        assert named == {value.name for value in values}
    vocabulary = next(value for value in graph.output if value.name == "logits").type.tensor_type.shape.dim[-1]
    assert vocabulary.dim_value in (0, config["model"]["vocab_size"])


@pytest.mark.parametrize("padding", [0, 45])
def test_padded_vocabulary_does_not_move_the_end_token(padding: int, tmp_path: Path) -> None:
    """OpenAI's hparams.json has no special ids; the last id is the end token only without padding."""
    found = {name: str(TOKENIZER / name) for name in ("encoder.json", "vocab.bpe")}
    tokens = len(json.loads((TOKENIZER / "encoder.json").read_text()))
    checkpoint = openai_checkpoint(tmp_path, tokenizer=found, vocab_size=tokens + padding)
    files = written(checkpoint)
    assert {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"} < set(files)
    for name in ("config.json", "generation_config.json"):
        assert json.loads(files[name])["eos_token_id"] == tokens - 1, name
    model = json.loads(files["genai_config.json"])["model"]
    assert (model["pad_token_id"], model["vocab_size"]) == (tokens - 1, tokens + padding)
    tokenizer = tokenizer_files(checkpoint)[0]
    planned = sidecar_files(exports(with_special_ids(checkpoint, tokenizer)), Options(), tokenizer)
    assert files == {file.path: file.head for file in planned}


def test_a_stated_end_token_is_not_overruled() -> None:
    found = {name: str(TOKENIZER / name) for name in ("encoder.json", "vocab.bpe")}
    raw, arrays = tiny_gpt2(vocab_size=3000, eos_token_id=7)
    checkpoint = checkpoint_of(raw, arrays, tokenizer=found)
    assert with_special_ids(checkpoint, tokenizer_files(checkpoint)[0]).special_ids.eos == (7,)
