"""Generation settings: the special ids and sampling defaults that transformers reads with a model.

transformers takes them from ``generation_config.json``. A checkpoint without that file is older, and states its
settings in ``config.json``; newer versions no longer read them there if the file exists, so they are moved to it.

Special ids have one form for all files written and all runtimes: those of ``generation_config.json``, and
``config.json``'s where that file lacks a key. Null means none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gptconvert.errors import InputError
from gptconvert.model.config_kinds import TOKEN, TOKENS

GENERATION_CONFIG: Final = "generation_config.json"
#: Settings of transformers' ``GenerationConfig`` → the value that ``generate`` uses if they are not set.
GENERATION_DEFAULTS: Final[Mapping[str, object]] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "use_cache": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": None,
    "return_dict_in_generate": False,
    **dict.fromkeys(
        """max_new_tokens min_new_tokens max_time stop_strings min_p top_h bad_words_ids force_words_ids
        forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty suppress_tokens
        begin_suppress_tokens sequence_bias guidance_scale penalty_alpha decoder_start_token_id""".split()
    ),
}
#: If one of these is on, transformers returns a dictionary.
OUTPUT_FLAGS: Final = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


@dataclass(frozen=True)
class SpecialIds:
    """The token ids with a meaning in generation.

    Attributes:
        bos: starts a text.
        eos: generation stops after any of these.
        pad: fills rows that have ended.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None

    def stops(self, vocab_size: int) -> tuple[int, ...]:
        """The end tokens that a model with this vocabulary can generate."""
        return tuple(token for token in self.eos if 0 <= token < vocab_size)

    def filler(self, vocab_size: int) -> int | None:
        """The token that fills ended rows: padding, else the first end token; None if no row can end."""
        stops = self.stops(vocab_size)
        if not stops:
            return None
        return self.pad if self.pad is not None and 0 <= self.pad < vocab_size else stops[0]

    def as_json(self) -> dict[str, object]:
        """The ids under transformers' keys; ids that are not set are absent."""
        ids = {"bos_token_id": self.bos, "eos_token_id": TOKENS.write(self.eos), "pad_token_id": self.pad}
        return {key: value for key, value in ids.items() if value is not None}


def special_ids(*files: tuple[Mapping[str, object], str | None]) -> SpecialIds:
    """The ids of configuration files, given as (content, path); the first file with a key decides it.

    Raises:
        InputError: an id is not a whole number, a list of whole numbers or null.
    """
    found: dict[str, Any] = {}
    for key, kind in (("bos_token_id", TOKEN), ("eos_token_id", TOKENS), ("pad_token_id", TOKEN)):
        raw, path = next((file for file in files if key in file[0]), ({}, None))
        if raw.get(key) in (None, []):
            continue
        try:
            found[key.partition("_")[0]] = kind.read(key, raw[key])
        except InputError as error:
            error.path = error.path or path
            raise
    return SpecialIds(**found)


def moved_settings(config: Mapping[str, object]) -> dict[str, object]:
    """The settings of a config.json that differ from the defaults, as transformers moves them.

    Special ids are not among them.
    """
    moved = {
        key: config[key]
        for key, default in GENERATION_DEFAULTS.items()
        if config.get(key) is not None and config[key] != default
    }
    if any(moved.get(flag) for flag in OUTPUT_FLAGS):
        moved["return_dict_in_generate"] = True
    return moved


def ids_outside(vocab_size: int, *files: Mapping[str, object]) -> dict[tuple[str, int], None]:
    """(key, id) of each special id in ``files`` that the vocabulary lacks, in order."""
    found: dict[tuple[str, int], None] = {}
    for raw in files:
        for key in sorted(name for name in raw if name.endswith("_token_id")):
            value = raw[key]
            ids = value if isinstance(value, list) else [value]
            found |= {(key, i): None for i in ids if isinstance(i, int) and not 0 <= i < vocab_size}
    return found
