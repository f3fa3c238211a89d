"""GPT-2 as saved by nanoGPT.

Sources: karpathy/nanoGPT ``model.py`` and ``train.py`` (names, ``model_args``; erf GELU since June 2023);
karpathy/build-nanogpt ``train_gpt2.py`` (the same names, always with biases; tanh GELU).
"""

from __future__ import annotations

from dataclasses import replace

from gptconvert.errors import InputError
from gptconvert.families.family import ConfigInput, Layout, ReadConfig
from gptconvert.families.heads import own_lm_head, tied_lm_head
from gptconvert.families.keys import table
from gptconvert.families.trainers.linear import GELUS, SHAPES
from gptconvert.families.trainers.sizes import gpt2_end, required_sizes, stated_heads
from gptconvert.model.config_kinds import FLAG, WHOLE
from gptconvert.model.config_table import Key
from gptconvert.model.names import collapse
from gptconvert.model.schemes import Drop, Row, Scheme, Tied, expand
from reference_model.config import GPTConfig

#: ``bias=False`` omits every bias, which is equivalent to zero biases.
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

MODEL_ARGS = table(
    Key("vocab_size", "vocab_size", WHOLE),
    Key("block_size", "n_ctx", WHOLE),
    Key("n_embd", "n_embd", WHOLE),
    Key("n_layer", "n_layer", WHOLE),
    Key("n_head", "n_head", WHOLE, None),
    Key("bias", "has_bias", FLAG, True),
    # Forks choose among equal attention kernels, and record how they ran.
    harmless=("dropout", "flash", "flash_attn", "flash_attention", "compile", "device", "init_from"),
    derived={"bos_token_id": gpt2_end, "eos_token_id": gpt2_end},
)


#: build-nanogpt's files, which differ in the configuration and the GELU.
BUILD = replace(NANOGPT, name="nanogpt:build")


def read(given: ConfigInput) -> ReadConfig:
    """Read ``model_args``; sizes missing in older files come from the shapes."""
    why = "erf is assumed, nanoGPT's since June 2023 (for older models: --activation tanh)"
    return _read(given, "erf", f"nanoGPT's files do not record which GELU the model was trained with: {why}")


def read_build(given: ConfigInput) -> ReadConfig:
    """Read build-nanogpt's ``config``."""
    why = "tanh is assumed, as in build-nanogpt (else --activation erf)"
    return _read(given, "tanh", f"the file does not record which GELU the model was trained with: {why}")


def _read(given: ConfigInput, gelu: str, note: str) -> ReadConfig:
    """The configuration, with the GELU formula and the note about it if no option gives one."""
    sizes = required_sizes(NANOGPT, given.tensors, given.path)
    reading = MODEL_ARGS.read(given.raw, given.path, defaults=sizes.fields)
    heads, notes = stated_heads(given, reading, "model_args does not contain n_head")
    tied, requested = _is_tied(given, sizes.prefix), given.options.activation
    config = given.config(reading, tied=tied, n_head=heads, activation=GELUS[requested or gelu], tied_head=tied)
    _check_biases(given, config, sizes.prefix, has_bias=reading.values["has_bias"])
    if not reading.values["has_bias"]:
        notes.append("bias=False: the missing biases are written as zeros, which is equivalent")
    if not tied:
        notes.append("lm_head.weight is stored separately from the embedding: it is kept as an untied head")
    if requested is None:
        notes.append(note)
    return ReadConfig(config, reading.special_ids(config), notes)


def _is_tied(given: ConfigInput, prefix: str) -> bool:
    """Whether the head is absent or shares the embedding's bytes."""
    head = given.tensors.get(prefix.removesuffix("transformer.") + "lm_head.weight")
    return head is None or head.segments() == given.tensors[f"{prefix}wte.weight"].segments() is not None


def _check_biases(given: ConfigInput, config: GPTConfig, prefix: str, *, has_bias: bool) -> None:
    """Require all biases or none, so that a row that may be absent does not hide a damaged file.

    Raises:
        InputError: the tensors contradict ``model_args``.
    """
    rows = (row for row in NANOGPT.rows if row.absent is not None)
    names = [bound.stored[0] for bound in expand(rows, config, prefix)]
    wrong = [name for name in names if (name in given.tensors) != has_bias]
    if wrong:
        raise InputError(
            f"model_args has bias={has_bias}, but these biases are {'missing' if has_bias else 'present'}: "
            f"{', '.join(collapse(wrong)[:8])}",
            path=given.path,
            item="bias",
        )


LAYOUTS = (Layout(NANOGPT, read), Layout(BUILD, read_build))
