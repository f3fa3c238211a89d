"""What a family file provides, and the reader that lets no configuration key pass unseen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from gptconvert.errors import InputError, UnsupportedError, UsageError
from gptconvert.model.options import Options
from gptconvert.model.schemes import Scheme
from gptconvert.model.tensors import LazyTensor
from gptconvert.model.transforms import take_rows
from reference_model.config import ConfigError, GPTConfig

T = TypeVar("T")

#: config.json keys of every model type that change no output of a forward pass.
HARMLESS = frozenset(
    """architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path task_specific_params
    id2label label2id num_labels problem_type output_attentions output_hidden_states return_dict use_return_dict
    output_past use_cache gradient_checkpointing initializer_range torchscript finetuning_task language
    tokenizer_class prefix license _commit_hash _num_labels transformers.js_config use_bfloat16 n_special
    predict_special_tokens embd_pdrop resid_pdrop attn_pdrop
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens sep_token_id decoder_start_token_id""".split()
)
#: Keys that may stand in any config.json at the value that means "not used".
UNUSED: Mapping[str, object] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "tf_legacy_loss": False,
    "quantization_config": None,
    "rope_scaling": None,
    "auto_map": None,
}
#: HF names of activations, by the exact formula they stand for.
HF_ACTIVATIONS: Mapping[str, str] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
#: The name written for each formula.
HF_ACTIVATION_NAME: Mapping[str, str] = {
    "gelu_tanh": "gelu_new",
    "gelu_erf": "gelu",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}


class ConfigKeys:
    """A raw configuration read key by key; :meth:`finish` refuses every key nobody asked for.

    Args:
        raw: the parsed file.
        path: the file, for messages.
    """

    def __init__(self, raw: Mapping[str, object], path: str | None) -> None:
        self.raw, self.path = raw, path
        self.seen: set[str] = set()

    def integer(self, key: str, default: int | None = None, *aliases: str) -> int:
        """A whole number; a float that is one (12.0) is not accepted."""
        value = self._get(key, default, aliases)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "a whole number", value)
        return value

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        """A whole number or null. A list of ids (several end tokens) gives its first."""
        self.seen.add(key)
        value = self.raw.get(key, default)
        if isinstance(value, list) and value:
            value = value[0]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self._wrong(key, "a whole number or null", value)
        return value

    def number(self, key: str, default: float, *aliases: str) -> float:
        """A finite number."""
        value = self._get(key, default, aliases)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self._wrong(key, "a finite number", value)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default, ())
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key, default, ())
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def choice(self, key: str, default: str, table: Mapping[str, T]) -> T:
        """``table[value]``; any other value is a feature not implemented."""
        value = self.text(key, default)
        if value not in table:
            raise UnsupportedError(
                f"{key} {value!r} is not implemented",
                path=self.path,
                item=key,
                expected=f"one of {', '.join(table)}",
                found=value,
            )
        return table[value]

    def finish(self, harmless: Collection[str] = (), unused: Mapping[str, object] | None = None) -> dict[str, object]:
        """Refuse, by name, every key that is neither handled, harmless nor at its unused value.

        Returns:
            the harmless keys, to be passed on.
        """
        expected = {**UNUSED, **(unused or {})}
        left = [key for key in self.raw if key not in self.seen and key not in HARMLESS | set(harmless)]
        refused = [k for k in left if k not in expected or not _same(self.raw[k], expected[k])]
        if refused:
            listed = ", ".join(f"{key} = {self.raw[key]!r}"[:120] for key in refused)
            raise UnsupportedError(
                f"configuration keys not implemented: {listed}",
                path=self.path,
                hint="a key that is not understood could change the logits, so it is never ignored; "
                "remove it if you know that it changes nothing",
            )
        return {k: v for k, v in self.raw.items() if k not in self.seen and k not in left}

    def build(self, **fields: object) -> GPTConfig:
        """The configuration, its own complaints turned into input errors that name file and key."""
        try:
            return GPTConfig(**fields)  # type: ignore[arg-type]
        except ConfigError as error:
            raise InputError(error.why, path=self.path, item=error.key, found=repr(error.value)) from error

    def _get(self, key: str, default: object, aliases: tuple[str, ...]) -> object:
        names = [name for name in (key, *aliases) if name in self.raw]
        self.seen.update((key, *aliases))
        values = [self.raw[name] for name in names]
        if any(value != values[0] for value in values[1:]):
            pairs = ", ".join(f"{n} = {self.raw[n]!r}" for n in names)
            raise InputError(f"two keys for one size disagree: {pairs}", path=self.path)
        value = values[0] if values else default
        if value is None:
            raise InputError("required key is missing", path=self.path, item=key)
        return value

    def _wrong(self, key: str, expected: str, found: object) -> InputError:
        return InputError("wrong value", path=self.path, item=key, expected=expected, found=repr(found)[:80])


def _same(value: object, unused: object) -> bool:
    return value == unused or (not value and not unused)


def per_layer(value: T, layers: int) -> tuple[T, ...]:
    """``value`` for every layer; a bound keeps a damaged layer count from filling memory before it is refused."""
    return (value,) * min(layers, 10_001)


def usual_scale(width: int, heads: int) -> float:
    """1 / √(features per head); 1 for sizes that are refused later."""
    return float((width / heads) ** -0.5) if width > 0 and heads > 0 else 1.0


def heads_of_width(width: int, request: Options, missing: str) -> tuple[int, str]:
    """The number of heads where no file records it: as asked, else OpenAI's head size of 64.

    Args:
        width: D.
        request: what the user wants.
        missing: why it is not known, for messages.

    Returns:
        the number and how it was found.

    Raises:
        UsageError: it must be asked for, or what was asked for cannot be.
    """
    if request.n_head is None:
        if width % 64 or not width:
            raise UsageError(
                f"{missing} and the number of heads is not in the weights (n_embd {width} is no multiple of 64, "
                "OpenAI's head size)",
                hint="pass --n-head N or --hparams FILE",
            )
        return width // 64, f"{width} / 64, OpenAI's head size"
    if request.n_head < 1 or width % request.n_head:
        raise UsageError(
            f"--n-head {request.n_head} does not divide the embedding's width", expected=f"a divisor of {width}"
        )
    return request.n_head, "as asked"


#: Canonical tensors with one row, or entry, per id.
BY_ID = ("wte.weight", "lm_head.weight", "lm_head.bias")


def trim_vocabulary(
    config: GPTConfig, weights: Mapping[str, LazyTensor], size: int
) -> tuple[GPTConfig, dict[str, LazyTensor], list[str]]:
    """The model with the ids from ``size`` on left out, and a note that says so.

    Raises:
        UsageError: there are not so many, or a token that ends or begins texts is among them.
    """
    if not 0 < size <= config.vocab_size:
        raise UsageError(f"--trim-vocab {size}", expected=f"1 to {config.vocab_size}, the model's vocabulary")
    lost = [i for i in (config.bos_token_id, config.eos_token_id, config.pad_token_id) if i is not None and i >= size]
    if lost:
        raise UsageError(
            f"--trim-vocab {size} cuts off the special token {lost[0]}", expected=f"at least {max(lost) + 1}"
        )
    kept = {n: take_rows(w, [(0, size)]) if n in BY_ID else w for n, w in weights.items()}
    note = f"the vocabulary was cut from {config.vocab_size} ids to {size} (--trim-vocab)"
    return dataclasses.replace(config, vocab_size=size), kept, [note] if size < config.vocab_size else []


ReadConfig = Callable[
    [Mapping[str, object], "str | None", Mapping[str, LazyTensor], Options],
    "tuple[GPTConfig, dict[str, object], list[str]]",
]


@dataclass(frozen=True)
class Family:
    """One GPT: how its configurations and tensor names translate.

    Attributes:
        name: registry name.
        title: for people.
        model_types: values of config.json's ``model_type``.
        schemes: name table of each naming scheme; a format with several calls them ``FORMAT:WHICH``.
        read_config: per naming scheme: (raw, path, tensors, request) → (config, carried keys, notes).
        write_config: config.json, from the configuration and the carried keys.
        heads: task → the architecture that config.json names for it; tasks the family has no head for are absent.
        tokenizer: kind of BPE: ``byte-level`` or ``word-end``.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    schemes: tuple[Scheme, ...]
    read_config: Mapping[str, ReadConfig]
    write_config: Callable[[GPTConfig, Mapping[str, object]], dict[str, object]]
    heads: Mapping[str, str]
    tokenizer: str = "byte-level"

    def scheme(self, name: str) -> Scheme:
        """The name table of a naming scheme."""
        return next(scheme for scheme in self.schemes if scheme.name == name)
