"""GPT-2 as Megatron-LM saves it.

Source: NVIDIA/Megatron-LM (module names, arguments), and, for the order of q, k and v in each checkpoint version,
Hugging Face's ``megatron_gpt2`` conversion.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.errors import UnsupportedError, UsageError
from gptconvert.families.family import ConfigInput, Layout, ReadConfig
from gptconvert.families.trainers.linear import GELUS, SHAPES
from gptconvert.families.trainers.sizes import gpt2_end, required_sizes, stated_heads
from gptconvert.model.config_kinds import ANY, NUMBER, OPTIONAL_WHOLE, SIZE, WHOLE, flag
from gptconvert.model.config_table import ConfigTable, Key, Reading
from gptconvert.model.schemes import Drop, Row, Scheme
from gptconvert.model.transforms import DeinterleaveFeatures, DeinterleaveHeads, Transform

_MEGATRON_NAMES: Mapping[str, str] = {
    "wte.weight": "embedding.word_embeddings.weight",
    "wpe.weight": "embedding.position_embeddings.weight",
    "h.{i}.ln_1": "{body}.layers.{i}.input_{norm}",
    "h.{i}.attn.c_attn": "{body}.layers.{i}.{attention}.query_key_value",
    "h.{i}.attn.c_proj": "{body}.layers.{i}.{attention}.dense",
    "h.{i}.ln_2": "{body}.layers.{i}.post_attention_{norm}",
    "h.{i}.mlp.c_fc": "{body}.layers.{i}.mlp.dense_h_to_4h",
    "h.{i}.mlp.c_proj": "{body}.layers.{i}.mlp.dense_4h_to_h",
    "ln_f": "{body}.final_{norm}",
}
#: The word that differs between versions → its forms, oldest first.
_FORMS: Mapping[str, tuple[str, ...]] = {
    "{body}": ("transformer", "encoder"),
    "{attention}": ("attention", "self_attention"),
    "{norm}": ("layernorm", "norm"),
}


def _megatron_names(canonical: str) -> tuple[str, ...]:
    """All names of a tensor.

    Later versions renamed transformer to encoder, attention to self_attention, and layernorm to norm.
    """
    stem, _, kind = canonical.rpartition(".")
    template = _MEGATRON_NAMES.get(canonical) or f"{_MEGATRON_NAMES[stem]}.{kind}"
    found = [template]
    for word, forms in _FORMS.items():
        found = [name.replace(word, form) for name in found for form in forms]
    return tuple(dict.fromkeys(found))


def _megatron(version: int, qkv_steps: tuple[Transform, ...]) -> Scheme:
    rows = []
    for canonical, shape in SHAPES.items():
        name, *others = _megatron_names(canonical)
        rows.append(Row(canonical, name, shape, qkv_steps if ".c_attn." in canonical else (), aliases=tuple(others)))
    return Scheme(
        name=f"megatron:{version}",
        anchor="embedding.word_embeddings.weight",
        prefixes=("language_model.", "model.language_model.", "module.language_model."),
        write_prefix="language_model.",
        rows=tuple(rows),
        drops=(Drop(r".*\._extra_state", "state of a kernel library"),),
    )


#: By checkpoint version; the rows of q, k and v are laid out as [3, H, hd]; [H, hd, 3]; [H, 3, hd].
MEGATRON: tuple[Scheme, ...] = (
    _megatron(0, ()),
    _megatron(1, (DeinterleaveFeatures(),)),
    _megatron(2, (DeinterleaveHeads(),)),
)

OPTIONAL_FLAG = flag(True, False, nullable=True)
#: The arguments that affect a forward pass; the hundreds of others do not and are not read.
ARGUMENTS = ConfigTable(
    keys=(
        Key("padded_vocab_size", "vocab_size", WHOLE),
        Key("max_position_embeddings", "n_ctx", WHOLE),
        Key("hidden_size", "n_embd", WHOLE),
        Key("num_layers", "n_layer", WHOLE),
        Key("num_attention_heads", "n_head", WHOLE, None),
        Key("ffn_hidden_size", "n_inner", SIZE, None),
        Key("layernorm_epsilon", "norm_eps", NUMBER, 1e-5, aliases=("norm_epsilon",)),
        Key("kv_channels", "head_width", OPTIONAL_WHOLE, None),
        Key("bias_gelu_fusion", "bias_gelu_fusion", OPTIONAL_FLAG, None),
        Key("openai_gelu", "openai_gelu", OPTIONAL_FLAG, None),
        Key("onnx_safe", "onnx_safe", ANY, None),
    ),
    unused={
        "apply_residual_connection_post_layernorm": False,
        "position_embedding_type": "learned_absolute",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "untie_embeddings_and_output_weights": False,
        "normalization": "LayerNorm",
        "apply_layernorm_1p": False,
        "add_bias_linear": True,
        "disable_bias_linear": False,
        "swiglu": False,
        "squared_relu": False,
        "num_experts": None,
        "group_query_attention": False,
        "multi_query_attention": False,
        "num_attention_groups": None,
    },
    derived={"bos_token_id": gpt2_end, "eos_token_id": gpt2_end},
)

#: Arguments that Megatron-LM's checkpoint converter sets, whatever the model was trained with.
_CONVERTED: Mapping[str, object] = {
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "use_cpu_initialization": True,
}


def read(given: ConfigInput) -> ReadConfig:
    """Read the training arguments; without them (the released 345M model), take the sizes from the shapes."""
    sizes = required_sizes(MEGATRON[0], given.tensors, given.path)
    decisive = ARGUMENTS.handled | ARGUMENTS.unused.keys()
    raw = {key: value for key, value in given.raw.items() if key in decisive}
    reading = ARGUMENTS.read(raw, given.path, defaults=sizes.fields)
    heads, notes = stated_heads(given, reading, "the file has no training arguments")
    activation, how = _activation(given, reading)
    width, channels = reading.values["n_embd"], reading.values["head_width"]
    if channels is not None and heads and channels * heads != width:
        raise UnsupportedError(
            "head widths that do not add up to the model's width are not implemented",
            path=given.path,
            item="kv_channels",
            expected=width // heads,
            found=channels,
        )
    return given.read(reading, [*notes, *how], n_head=heads, activation=activation)


def _activation(given: ConfigInput, reading: Reading) -> tuple[str, list[str]]:
    """The GELU formula: tanh with the fused kernel or ``openai_gelu``, otherwise PyTorch's default, erf.

    Megatron-LM's checkpoint converter writes ``bias_gelu_fusion = False`` into the arguments of every model, along
    with its other options; such a file does not record the formula. Where fusion is off, ``--activation`` decides, as
    the file may have passed through the converter anyway.
    """
    values, requested = reading.values, given.options.activation
    stated = [name for name in ("bias_gelu_fusion", "openai_gelu", "onnx_safe") if values[name] is not None]
    if values["bias_gelu_fusion"] or values["openai_gelu"]:
        if requested == "erf":
            raise UsageError(
                "--activation contradicts the checkpoint's training arguments",
                path=given.path,
                expected="tanh",
                found=requested,
            )
        return GELUS["tanh"], []
    if requested is not None:
        return GELUS[requested], []
    if not stated:
        why = "the file does not record which GELU the model was trained with"
    elif all(given.raw.get(name) == value for name, value in _CONVERTED.items()):
        why = "Megatron-LM's checkpoint converter wrote this file and turned off bias_gelu_fusion in its arguments"
    else:
        return GELUS["erf"], []
    return GELUS["tanh"], [f"{why}: tanh is assumed, Megatron-LM's default (else --activation erf)"]


LAYOUTS = tuple(Layout(scheme, read) for scheme in MEGATRON)
