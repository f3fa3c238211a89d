"""GPT-2 and GPT-NeoX in llama.cpp's GGUF files: tensor names and metadata keys.

Sources: ggml-org/llama.cpp ``src/llama-arch.cpp`` (names), ``src/models/gpt2.cpp``, ``src/models/gptneox.cpp``.
Linear weights are [out, in], and q, k and v are one tensor of three blocks, as in the canonical form. Keys are those
of the file without the prefix of the architecture, and with ``_`` for ``.`` (``attention_head_count``).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gptconvert.errors import UnsupportedError
from gptconvert.families.family import ConfigInput, Layout, ReadConfig
from gptconvert.families.heads import own_lm_head, tied_lm_head
from gptconvert.families.keys import table
from gptconvert.families.trainers.linear import GELUS, SHAPES
from gptconvert.model.config_kinds import FLAG, NUMBER, SIZE, TEXT, TOKEN, TOKENS, WHOLE, flag
from gptconvert.model.config_table import Key, Reading, Values
from gptconvert.model.schemes import Row, Scheme, Tied
from gptconvert.model.tensors import LazyTensor
from reference_model.rotary import RopeScaling, Rotary

#: Canonical module → GGUF's; those of a block after ``h.{i}.`` and ``blk.{i}.``.
MODULES: Mapping[str, str] = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}
#: The head, which the format may store although it is tied.
OUTPUT = "output.weight"
#: Rows of the embedding and the head that are compared to find out whether the head is tied.
COMPARED_ROWS = 8


def gguf_name(canonical: str) -> str:
    """``h.3.attn.c_attn.weight`` → ``blk.3.attn_qkv.weight``."""
    module, _, kind = canonical.rpartition(".")
    if not module.startswith("h."):
        return f"{MODULES[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"blk.{layer}.{MODULES[inner]}.{kind}"


def _scheme(architecture: str, *without: str) -> Scheme:
    return Scheme(
        name=f"gguf:{architecture}",
        anchor="token_embd.weight",
        rows=(
            *(Row(name, gguf_name(name), shape) for name, shape in SHAPES.items() if name not in without),
            Row("lm_head.weight", OUTPUT, "V D", when=own_lm_head, head=True),
        ),
        tied=(Tied(OUTPUT, "wte.weight", "V D", when=tied_lm_head),),
    )


GPT2_SCHEME, NEOX_SCHEME = _scheme("gpt2"), _scheme("gptneox", "wpe.weight")

KEYS = (
    Key("vocab_size", "vocab_size", WHOLE),
    Key("context_length", "n_ctx", WHOLE),
    Key("embedding_length", "n_embd", WHOLE),
    Key("block_count", "n_layer", WHOLE),
    Key("attention_head_count", "n_head", WHOLE),
    Key("attention_head_count_kv", "kv_heads", WHOLE, lambda values: values["n_head"]),
    Key("feed_forward_length", "n_inner", SIZE, None),
    Key("attention_layer_norm_epsilon", "norm_eps", NUMBER),
    Key("bos_token_id", "bos_token_id", TOKEN, None),
    Key("eos_token_id", "eos_token_id", TOKENS, None),
    Key("pad_token_id", "pad_token_id", TOKEN, None),
)
UNUSED: Mapping[str, object] = {"attention_causal": True}
GPT2_KEYS = table(*KEYS, harmless=("file_type",), unused=UNUSED)


def _rotary(values: Values) -> Rotary:
    """llama.cpp rotates whole heads, unless the file limits it, and knows four kinds of scaling; one is read."""
    heads, kind = max(values["n_head"], 1), values["scaling"]
    if kind not in ("none", "linear"):
        raise UnsupportedError(
            "this scaling of rotary positions is not read",
            item="rope_scaling_type",
            expected="none or linear",
            found=kind,
        )
    dim = values["n_embd"] // heads if values["dim"] is None else values["dim"]
    scaling = RopeScaling("linear", values["factor"]) if kind == "linear" else None
    return Rotary(dim, values["base"], scaling=scaling)


NEOX_KEYS = table(
    *KEYS,
    Key("use_parallel_residual", "residual", flag("parallel", "serial"), True),
    Key("rope_dimension_count", "dim", SIZE, None),
    Key("rope_freq_base", "base", NUMBER, 10000.0),
    Key("rope_scaling_type", "scaling", TEXT, "none"),
    Key("rope_scaling_factor", "factor", NUMBER, 1.0),
    # Of the original context, which linear scaling does not read.
    Key("rope_scaling_original_context_length", None, SIZE, None),
    Key("rope_scaling_finetuned", None, FLAG, False),
    harmless=("file_type",),
    unused=UNUSED,
    derived={"rotary": _rotary},
)


def read_gpt2(given: ConfigInput) -> ReadConfig:
    """Read the metadata. llama.cpp computes the tanh GELU."""
    return _read(given, GPT2_KEYS.read(given.raw, given.path, defaults=_defaults(given)), "tanh", ())


def read_neox(given: ConfigInput) -> ReadConfig:
    """Read the metadata. llama.cpp computes the tanh GELU, but Pythia is defined with the erf formula."""
    note = "GGUF does not record which GELU the model uses: erf is assumed, as in Pythia (else --activation tanh)"
    reading = NEOX_KEYS.read(given.raw, given.path, defaults=_defaults(given))
    return _read(given, reading, "erf", () if given.options.activation else (note,))


def _defaults(given: ConfigInput) -> dict[str, object]:
    """The number of ids, which few files state."""
    embedding = given.tensors.get("token_embd.weight")
    return {} if embedding is None or len(embedding.shape) != 2 else {"vocab_size": embedding.shape[0]}


def _read(given: ConfigInput, reading: Reading, gelu: str, notes: tuple[str, ...]) -> ReadConfig:
    heads, groups = reading.values["n_head"], reading.values["kv_heads"]
    if heads != groups:
        raise UnsupportedError(
            "heads that share keys and values are not supported",
            path=given.path,
            item="attention_head_count_kv",
            expected=heads,
            found=groups,
        )
    activation = GELUS[given.options.activation or gelu]
    # The head is always there, if only as the embedding.
    return given.read(reading, notes, tied=True, tied_head=_is_tied(given.tensors), activation=activation)


def _is_tied(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the head is absent, or some of its rows are those of the embedding; the rest is compared later."""
    head, embedding = tensors.get(OUTPUT), tensors.get("token_embd.weight")
    if head is None or embedding is None:
        return True
    if head.shape != embedding.shape or head.dtype != embedding.dtype or len(head.shape) != 2:
        return False
    rows = np.unique(np.linspace(0, head.shape[0] - 1, COMPARED_ROWS).astype(int)) if head.shape[0] else ()
    boxes = [(slice(row, row + 1), slice(0, head.shape[1])) for row in map(int, rows)]
    return all(head.read(box).tobytes() == embedding.read(box).tobytes() for box in boxes)


GPT2, NEOX = Layout(GPT2_SCHEME, read_gpt2), Layout(NEOX_SCHEME, read_neox)
