"""GPT-2 as other trainers save it: nanoGPT, llm.c and Megatron-LM. Their linear layers are torch's, [out, in].

Sources: karpathy/nanoGPT ``model.py`` and ``train.py`` (names, ``model_args``; GELU by erf since June 2023);
karpathy/llm.c ``train_gpt2.py`` and ``train_gpt2.c`` (header, order of the stacked tensors, tanh-GELU);
NVIDIA/Megatron-LM (module names, arguments) and the order of q, k and v in each of its checkpoint versions, as
Hugging Face's ``megatron_gpt2`` conversion describes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gptconvert.errors import InputError, UnsupportedError, UsageError
from gptconvert.families.family import ConfigKeys, ReadConfig, heads_of_width, per_layer, usual_scale
from gptconvert.families.heads import choose_task, own_lm_head, tied_lm_head
from gptconvert.model.options import Options
from gptconvert.model.schemes import Drop, Order, Row, Scheme, Tied, collapse, expand, find_prefix
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import DeinterleaveFeatures, DeinterleaveHeads, Transform
from reference_model.config import GPTConfig

#: Canonical tensor → its shape, which all three trainers keep.
SHAPES: Mapping[str, str] = {
    "wte.weight": "V D",
    "wpe.weight": "C D",
    "h.{i}.ln_1.weight": "D",
    "h.{i}.ln_1.bias": "D",
    "h.{i}.attn.c_attn.weight": "3D D",
    "h.{i}.attn.c_attn.bias": "3D",
    "h.{i}.attn.c_proj.weight": "D D",
    "h.{i}.attn.c_proj.bias": "D",
    "h.{i}.ln_2.weight": "D",
    "h.{i}.ln_2.bias": "D",
    "h.{i}.mlp.c_fc.weight": "F D",
    "h.{i}.mlp.c_fc.bias": "F",
    "h.{i}.mlp.c_proj.weight": "D F",
    "h.{i}.mlp.c_proj.bias": "D",
    "ln_f.weight": "D",
    "ln_f.bias": "D",
}
#: ``--activation`` → formula.
GELUS: Mapping[str, str] = {"tanh": "gelu_tanh", "erf": "gelu_erf"}
#: Sizes of the vocabulary that GPT-2's tokenizer has, as it is and padded to a multiple of 64.
GPT2_VOCABULARIES = (50257, 50304)
GPT2_END = 50256

#: ``bias=False`` leaves out every bias; a bias of zeros is the same thing.
NANOGPT = Scheme(
    name="nanogpt",
    anchor="wte.weight",
    prefixes=("transformer.", "_orig_mod.transformer.", "module.transformer.", "_orig_mod.module.transformer."),
    body="transformer.",
    write_prefix="transformer.",
    rows=(
        *(Row(name, name, shape, absent=0.0 if name.endswith(".bias") else None) for name, shape in SHAPES.items()),
        Row("lm_head.weight", "lm_head.weight", "V D", when=own_lm_head, head=True),
    ),
    drops=(
        Drop(r"h\.\d+\.attn\.bias", "causal mask buffer"),
        Drop(r"lm_head\.weight", "language-model head", when=lambda c: not c.has_lm_head),
    ),
    tied=(Tied("lm_head.weight", "wte.weight", "V D", when=tied_lm_head),),
)

_LLMC_NAMES: Mapping[str, str] = {
    "wte.weight": "wte",
    "wpe.weight": "wpe",
    "h.{i}.ln_1.weight": "h.{i}.ln1w",
    "h.{i}.ln_1.bias": "h.{i}.ln1b",
    "h.{i}.attn.c_attn.weight": "h.{i}.qkvw",
    "h.{i}.attn.c_attn.bias": "h.{i}.qkvb",
    "h.{i}.attn.c_proj.weight": "h.{i}.attprojw",
    "h.{i}.attn.c_proj.bias": "h.{i}.attprojb",
    "h.{i}.ln_2.weight": "h.{i}.ln2w",
    "h.{i}.ln_2.bias": "h.{i}.ln2b",
    "h.{i}.mlp.c_fc.weight": "h.{i}.fcw",
    "h.{i}.mlp.c_fc.bias": "h.{i}.fcb",
    "h.{i}.mlp.c_proj.weight": "h.{i}.fcprojw",
    "h.{i}.mlp.c_proj.bias": "h.{i}.fcprojb",
    "ln_f.weight": "lnfw",
    "ln_f.bias": "lnfb",
}
#: The file names nothing: it holds the tensors in this order, each stacked over the layers. ``P``: padded vocabulary.
LLMC = Scheme(
    name="llmc",
    anchor="wte",
    rows=tuple(Row(ours, _LLMC_NAMES[ours], shape) for ours, shape in SHAPES.items()),
    order=Order("row", padded={"wte": "P"}),
)

_MEGATRON_NAMES: Mapping[str, str] = {
    "wte.weight": "embedding.word_embeddings.weight",
    "wpe.weight": "embedding.position_embeddings.weight",
    "h.{i}.ln_1": "{body}.layers.{i}.input_layernorm",
    "h.{i}.attn.c_attn": "{body}.layers.{i}.{attention}.query_key_value",
    "h.{i}.attn.c_proj": "{body}.layers.{i}.{attention}.dense",
    "h.{i}.ln_2": "{body}.layers.{i}.post_attention_layernorm",
    "h.{i}.mlp.c_fc": "{body}.layers.{i}.mlp.dense_h_to_4h",
    "h.{i}.mlp.c_proj": "{body}.layers.{i}.mlp.dense_4h_to_h",
    "ln_f": "{body}.final_layernorm",
}


def _megatron_names(ours: str) -> tuple[str, ...]:
    """The names a tensor has had: the stack was called transformer, then encoder; its attention self_attention."""
    stem, _, kind = ours.rpartition(".")
    template = _MEGATRON_NAMES.get(ours) or f"{_MEGATRON_NAMES[stem]}.{kind}"
    ways = [(body, attention) for body in ("transformer", "encoder") for attention in ("attention", "self_attention")]
    found = (template.replace("{body}", body).replace("{attention}", attention) for body, attention in ways)
    return tuple(dict.fromkeys(found))


def _megatron(version: int, qkv_steps: tuple[Transform, ...]) -> Scheme:
    rows = []
    for ours, shape in SHAPES.items():
        name, *others = _megatron_names(ours)
        rows.append(Row(ours, name, shape, qkv_steps if ".c_attn." in ours else (), aliases=tuple(others)))
    return Scheme(
        name=f"megatron:{version}",
        anchor="embedding.word_embeddings.weight",
        prefixes=("language_model.", "model.language_model.", "module.language_model."),
        write_prefix="language_model.",
        rows=tuple(rows),
        drops=(Drop(r".*\._extra_state", "state of a kernel library"),),
    )


#: By the order of the rows of q, k and v: [3, H, hd]; [H, hd, 3]; [H, 3, hd].
MEGATRON: tuple[Scheme, ...] = (
    _megatron(0, ()),
    _megatron(1, (DeinterleaveFeatures(),)),
    _megatron(2, (DeinterleaveHeads(),)),
)


def nanogpt_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    """From ``model_args``; what older files leave out is taken from the shapes."""
    keys, shapes = ConfigKeys(raw, path), _Shapes(NANOGPT, tensors, r"h\.([0-9]{1,5})\.", path)
    width = keys.integer("n_embd", shapes.width)
    heads, notes = _heads(keys, "n_head", width, request, "model_args does not give it")
    has_bias = keys.boolean("bias", True)
    head = tensors.get(shapes.prefix.removesuffix("transformer.") + "lm_head.weight")
    tied = head is None or head.segments() == tensors[f"{shapes.prefix}wte.weight"].segments() is not None
    config = _gpt2(
        keys,
        vocab_size=keys.integer("vocab_size", shapes.vocabulary),
        n_ctx=keys.integer("block_size", shapes.context),
        n_embd=width,
        n_layer=keys.integer("n_layer", shapes.layers),
        n_head=heads,
        activation=GELUS[request.activation or "erf"],
        tied_head=tied,
        task=choose_task(HEADS, {}, path, tensors, request, tied=tied),
    )
    keys.finish(harmless=("dropout",))
    _check_biases(has_bias, config, shapes.prefix, tensors, path)
    if not has_bias:
        notes.append("bias=False: the biases that the files do not have are written as zeros, which changes nothing")
    if not tied:
        notes.append("lm_head.weight is stored apart from the embedding: it is kept as a head of its own")
    if request.activation is None:
        notes.append(
            "nanoGPT's files do not say which GELU the model was trained with: erf is taken, nanoGPT's own since "
            "June 2023 (for older models: --activation tanh)"
        )
    return config, {}, notes


def llmc_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    """From the file's header."""
    keys = ConfigKeys(raw, path)
    config = _gpt2(
        keys,
        vocab_size=keys.integer("vocab_size"),
        n_ctx=keys.integer("max_seq_len"),
        n_embd=keys.integer("channels"),
        n_layer=keys.integer("num_layers"),
        n_head=keys.integer("num_heads"),
        task=choose_task(HEADS, {}, path, tensors, request, tied=True),
    )
    keys.finish(harmless=("version", "padded_vocab_size"))
    return config, {}, []


#: Megatron-LM's arguments that make another model than GPT-2, at the value that leaves it GPT-2.
MEGATRON_UNUSED: Mapping[str, object] = {
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
}
#: Arguments that matter; of the hundreds of others none changes a forward pass.
MEGATRON_ARGUMENTS = (
    *MEGATRON_UNUSED,
    *"""padded_vocab_size max_position_embeddings hidden_size num_layers num_attention_heads ffn_hidden_size
    layernorm_epsilon norm_epsilon kv_channels bias_gelu_fusion openai_gelu onnx_safe""".split(),
)


def megatron_config(
    raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor], request: Options
) -> tuple[GPTConfig, dict[str, object], list[str]]:
    """From the arguments of the training run; without them from the shapes, as for the released 345M model."""
    shapes = _Shapes(MEGATRON[0], tensors, r"layers\.([0-9]{1,5})\.", path)
    keys = ConfigKeys({key: raw[key] for key in MEGATRON_ARGUMENTS if key in raw}, path)
    width = keys.integer("hidden_size", shapes.width)
    heads, notes = _heads(keys, "num_attention_heads", width, request, "the file holds no arguments")
    activation, how = _megatron_activation(keys, request)
    channels = keys.optional_integer("kv_channels")
    if channels is not None and heads and channels * heads != width:
        raise UnsupportedError(
            "heads that do not add up to the model's width are not implemented",
            path=path,
            item="kv_channels",
            expected=width // heads,
            found=channels,
        )
    config = _gpt2(
        keys,
        vocab_size=keys.integer("padded_vocab_size", shapes.vocabulary),
        n_ctx=keys.integer("max_position_embeddings", shapes.context),
        n_embd=width,
        n_layer=keys.integer("num_layers", shapes.layers),
        n_head=heads,
        n_inner=keys.optional_integer("ffn_hidden_size") or 4 * width,
        norm_eps=keys.number("layernorm_epsilon", 1e-5, "norm_epsilon"),
        activation=activation,
        task=choose_task(HEADS, {}, path, tensors, request, tied=True),
    )
    keys.finish(unused=MEGATRON_UNUSED)
    return config, {}, [*notes, *how]


def _megatron_activation(keys: ConfigKeys, request: Options) -> tuple[str, list[str]]:
    """The fused kernel and ``openai_gelu`` are the tanh formula; PyTorch's own GELU, used without them, is erf's."""
    told = [name for name in ("bias_gelu_fusion", "openai_gelu", "onnx_safe") if keys.raw.get(name) is not None]
    keys.seen.update(("bias_gelu_fusion", "openai_gelu", "onnx_safe"))
    if not told:
        why = "the file does not say which GELU the model was trained with: tanh is taken (--activation erf)"
        return GELUS[request.activation or "tanh"], [why] if request.activation is None else []
    tanh = any(keys.boolean(name, False) for name in ("bias_gelu_fusion", "openai_gelu") if name in told)
    name = "tanh" if tanh else "erf"
    if request.activation not in (None, name):
        raise UsageError(
            "--activation contradicts the checkpoint's own arguments",
            path=keys.path,
            expected=name,
            found=request.activation,
        )
    return GELUS[name], []


#: Tasks that a body with a language-model head serves, and the class for each.
HEADS: Mapping[str, str] = {"text-generation": "GPT2LMHeadModel", "feature-extraction": "GPT2Model"}


class _Shapes:
    """Sizes that the tables' shapes give away.

    Raises:
        InputError: there are no token and position tables.
    """

    def __init__(self, scheme: Scheme, tensors: Mapping[str, LazyTensor], layer: str, path: str | None) -> None:
        prefix = find_prefix(scheme, tensors)
        tables = [next(row for row in scheme.rows if row.canonical == ours) for ours in ("wte.weight", "wpe.weight")]
        found = [tensors.get((prefix or "") + row.names[0]) for row in tables]
        shapes = [() if tensor is None else tensor.shape for tensor in found]
        if prefix is None or [len(shape) for shape in shapes] != [2, 2]:
            raise InputError(
                f"no token and position tables (…{tables[0].names[0]}, …{tables[1].names[0]}) of two axes each",
                path=path,
                found=", ".join(collapse(sorted(tensors))[:6]) or "no tensors",
            )
        self.prefix = prefix
        (self.vocabulary, self.width), (self.context, _) = shapes
        self.layers = max((int(m[1]) for name in tensors if (m := re.search(layer, name))), default=-1) + 1


def _heads(keys: ConfigKeys, key: str, width: int, request: Options, missing: str) -> tuple[int, list[str]]:
    """The number of heads, and a note where no file gives it."""
    if key not in keys.raw:
        heads, how = heads_of_width(width, request, missing)
        return heads, [f"n_head = {heads} ({how})"]
    heads = keys.integer(key)
    if request.n_head not in (None, heads):
        raise UsageError(
            "--n-head contradicts the checkpoint itself", path=keys.path, expected=heads, found=request.n_head
        )
    return heads, []


def _gpt2(keys: ConfigKeys, **fields: object) -> GPTConfig:
    """A GPT-2 of these sizes; special ids only where the vocabulary is that of GPT-2's tokenizer."""
    width, heads, layers = (int(str(fields[name])) for name in ("n_embd", "n_head", "n_layer"))
    end = GPT2_END if fields["vocab_size"] in GPT2_VOCABULARIES else None
    common: dict[str, object] = {
        "family": "gpt2",
        "n_inner": 4 * width,
        "attn_scale": per_layer(usual_scale(width, heads), layers),
        "attn_window": per_layer(None, layers),
        "bos_token_id": end,
        "eos_token_id": end,
    }
    return keys.build(**{**common, **fields})


def _check_biases(
    has_bias: bool, config: GPTConfig, prefix: str, tensors: Mapping[str, LazyTensor], path: str | None
) -> None:
    """All biases or none: a row that may be absent must not hide a damaged file.

    Raises:
        InputError: the tensors contradict ``model_args``.
    """
    rows = (row for row in NANOGPT.rows if row.absent is not None)
    names = [bound.stored[0] for bound in expand(rows, config, prefix)]
    wrong = [name for name in names if (name in tensors) != has_bias]
    if wrong:
        raise InputError(
            f"model_args says bias={has_bias}, and these biases are {'missing' if has_bias else 'there'}: "
            f"{', '.join(collapse(wrong)[:8])}",
            path=path,
            item="bias",
        )


SCHEMES: tuple[Scheme, ...] = (NANOGPT, LLMC, *MEGATRON)
READ_CONFIG: Mapping[str, ReadConfig] = {
    NANOGPT.name: nanogpt_config,
    LLMC.name: llmc_config,
    **{scheme.name: megatron_config for scheme in MEGATRON},
}
