"""GPT-2 as released by OpenAI: a TensorFlow checkpoint and ``hparams.json``.

Source: openai/gpt-2 ``src/model.py``. Linear layers are convolutions of width 1, [1, in, out].
"""

from __future__ import annotations

from gptconvert.errors import InputError, UsageError
from gptconvert.families.family import ConfigInput, Layout, ReadConfig
from gptconvert.families.keys import table
from gptconvert.families.rows import CONV_TF
from gptconvert.families.trainers.sizes import heads_of_width, table_sizes
from gptconvert.model.config_kinds import WHOLE
from gptconvert.model.config_table import Key, Values
from gptconvert.model.schemes import Drop, Row, Scheme

#: Last part of a slot variable's name: the optimizer's name or a moment's.
OPTIMIZER_SLOT = (
    r"(?i:\w*(?:adam|adafactor|momentum|rmsprop|adagrad|adadelta|ftrl|lamb|lars|novograd|yogi|lion)\w*"
    r"|(?:ExponentialMovingAverage|grad_accum\w*|accumulator|m|v|vr|vc)(?:_\d+)?)"
)

OPENAI_TF = Scheme(
    name="openai-tf",
    anchor="model/wte",
    prefixes=None,
    rows=(
        Row("wte.weight", "model/wte", "V D"),
        Row("wpe.weight", "model/wpe", "C D"),
        Row("h.{i}.ln_1.weight", "model/h{i}/ln_1/g", "D"),
        Row("h.{i}.ln_1.bias", "model/h{i}/ln_1/b", "D"),
        Row("h.{i}.attn.c_attn.weight", "model/h{i}/attn/c_attn/w", "1 D 3D", CONV_TF),
        Row("h.{i}.attn.c_attn.bias", "model/h{i}/attn/c_attn/b", "3D"),
        Row("h.{i}.attn.c_proj.weight", "model/h{i}/attn/c_proj/w", "1 D D", CONV_TF),
        Row("h.{i}.attn.c_proj.bias", "model/h{i}/attn/c_proj/b", "D"),
        Row("h.{i}.ln_2.weight", "model/h{i}/ln_2/g", "D"),
        Row("h.{i}.ln_2.bias", "model/h{i}/ln_2/b", "D"),
        Row("h.{i}.mlp.c_fc.weight", "model/h{i}/mlp/c_fc/w", "1 D F", CONV_TF),
        Row("h.{i}.mlp.c_fc.bias", "model/h{i}/mlp/c_fc/b", "F"),
        Row("h.{i}.mlp.c_proj.weight", "model/h{i}/mlp/c_proj/w", "1 F D", CONV_TF),
        Row("h.{i}.mlp.c_proj.bias", "model/h{i}/mlp/c_proj/b", "D"),
        Row("ln_f.weight", "model/ln_f/g", "D"),
        Row("ln_f.bias", "model/ln_f/b", "D"),
    ),
    drops=(
        # Optimizer variables are outside model/ or, under a slot name, below one of the variables above.
        # Any other name under model/ could be part of the model (such as an adapter) and is not dropped.
        Drop(
            r"(?:.*/)?model/(?:wte|wpe|ln_f/[gb]|h\d+/(?:ln_[12]/[gb]|attn/c_(?:attn|proj)/[wb]|mlp/c_(?:fc|proj)/[wb]))/"
            rf"{OPTIMIZER_SLOT}",
            "optimizer slot",
        ),
        Drop(
            rf"(?:model/)?heads/\w+/[wb](?:/{OPTIMIZER_SLOT})?",
            "head of reinforcement learning",
            note="the heads of reinforcement learning, such as the value head, are left out",
        ),
        Drop(r"(?:.*/)?(?:global_step|beta\d_power|step|learning_rate)", "training counter"),
        Drop(r"(?!(?:.*/)?model/).+", "not a model variable"),
    ),
)


def _last_id(values: Values) -> object:
    """``<|endoftext|>`` is the last entry of OpenAI's vocabularies."""
    return values["vocab_size"] - 1


#: Training options that ConnorJL/GPT2 stores in the same file; ``scale`` scales the initial weights.
TRAINING = frozenset(
    """dtype precision encoder_path opt_name opt_params beta1 beta2 epsilon predict_batch_size iterations data_path
    predict_path input model model_path model_dir scale scale_by_depth scale_by_in train_steps""".split()
)
HPARAMS = table(
    Key("n_vocab", "vocab_size", WHOLE),
    Key("n_ctx", "n_ctx", WHOLE, 1024),
    Key("n_embd", "n_embd", WHOLE, 768),
    Key("n_head", "n_head", WHOLE, 12),
    Key("n_layer", "n_layer", WHOLE, 12),
    harmless=TRAINING,
    derived={"bos_token_id": _last_id, "eos_token_id": _last_id},
)


def read(given: ConfigInput) -> ReadConfig:
    """Read ``hparams.json``; without it, take the sizes from the shapes."""
    raw, requested = given.raw, given.options.n_head
    sizes, notes = ({}, []) if raw else _inferred(given)
    if raw and requested is not None and raw.get("n_head") != requested:
        raise UsageError(
            "--n-head contradicts the checkpoint's hparams.json",
            path=given.path,
            expected=raw.get("n_head"),
            found=requested,
        )
    return given.read(HPARAMS.read(raw, given.path, defaults=sizes), notes)


def _inferred(given: ConfigInput) -> tuple[dict[str, int], list[str]]:
    """The sizes from the shapes, the number of heads from the options, and a note for the user."""
    sizes = table_sizes(OPENAI_TF, given.tensors)
    if sizes is None:
        raise InputError(
            "no hparams.json, and model/wte and model/wpe, which give the sizes, are missing or malformed",
            hint="if these are OpenAI's GPT-2 variable names, pass --hparams FILE",
        )
    heads, how = heads_of_width(sizes.fields["n_embd"], given.options, "hparams.json is missing")
    note = f"hparams.json is missing: sizes taken from the shapes, n_head = {heads} ({how})"
    return {**sizes.fields, "n_head": heads}, [note]


LAYOUT = Layout(OPENAI_TF, read)
