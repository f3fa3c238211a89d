"""The two kinds of BPE that GPTs use, as data: file names, special tokens, and rules for splitting text.

Byte-level (GPT-2 and later; Radford et al. 2019; openai/gpt-2 ``src/encoder.py``): a regular expression splits the
text, and the UTF-8 bytes of the pieces are written as 256 printable characters. Every text can be encoded.

Word-end (GPT-1; Sennrich et al. 2016; openai/finetune-transformer-lm ``text_utils.py``): text is lower-cased and
split into words and punctuation, whose last symbol carries ``</w>``; white space is lost. The original splits with
spaCy (``tokenizer_gpt1``); this module, like transformers, uses the rules of BERT's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptconvert.sources.tokenizer_files import MAX_BYTES as MAX_BYTES

Vocabulary = Mapping[str, int]
Merges = Sequence[tuple[str, str]]
Settings = Mapping[str, object]

END = "<|endoftext|>"
UNKNOWN = "<unk>"
WORD_END = "</w>"
#: Ids are below this: the tokenizers library takes time and memory in proportion to the largest.
MAX_ID = 1 << 23
#: Limit on the commas and brackets of JSON: three of each merge and one of each token, of a million tokens.
MAX_VALUES = 4_000_000
#: transformers' class that uses all of tokenizer.json; its other classes read only the vocabulary and the merges, and
#: split text by their own rules.
WHOLE_FILE = "PreTrainedTokenizerFast"
#: Options of a BPE model besides vocabulary and merges.
MODEL_OPTIONS = (
    "dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges"
).split()


@dataclass(frozen=True)
class Kind:
    """One kind of BPE.

    Attributes:
        tokenizer_class: transformers' name for it.
        classes: transformers' classes that are this kind, without ``Fast``.
        named: its special tokens, by their keys in tokenizer_config.json.
        vocabulary: names its vocabulary file may have.
        merges: names its merges file may have.
        alphabet: symbols needed to encode every text.
        build: vocabulary, merges and the source's tokenizer_config.json → ``tokenizers.Tokenizer`` without special
            tokens.
        settings: keys of tokenizer_config.json other than the special tokens.
    """

    tokenizer_class: str
    classes: tuple[str, ...]
    named: Mapping[str, str]
    vocabulary: tuple[str, ...]
    merges: tuple[str, ...]
    alphabet: Callable[[Settings], Iterable[str]]
    build: Callable[[Vocabulary, Merges, Settings], Any]
    settings: Settings

    @property
    def end(self) -> str | None:
        """The end-of-text token; None for GPT-1."""
        return self.named.get("eos_token")

    def describes(self, found: Sequence[object], settings: Settings) -> bool:
        """Whether a tokenizer of this :func:`behaviour` splits and merges as the class does with ``settings``."""
        tokens = [*self.named.values(), *(token_text(settings.get(key)) for key in self.named)]
        vocabulary = {token: number for number, token in enumerate(dict.fromkeys(filter(None, tokens)))}
        return behaviour(self.build(vocabulary, (), settings)) == found


def token_text(token: object) -> str | None:
    """The text of a special token, which files store as a string or as an object with stripping rules."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _byte_alphabet(_: Settings) -> list[str]:
    """The 256 characters that represent bytes."""
    from tokenizers import pre_tokenizers

    alphabet: list[str] = pre_tokenizers.ByteLevel.alphabet()
    return alphabet


def _byte_level(vocabulary: Vocabulary, merges: Merges, settings: Settings) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space") is True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _unknown(settings: Settings) -> str:
    return token_text(settings.get("unk_token")) or UNKNOWN


def _word_end(vocabulary: Vocabulary, merges: Merges, settings: Settings) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = _unknown(settings)
    model = models.BPE(
        vocab=dict(vocabulary),
        merges=list(merges),
        end_of_word_suffix=WORD_END,
        unk_token=unknown if unknown in vocabulary else None,  # the library fails if it is not in the vocabulary
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # which also strips accents
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix=WORD_END)
    return tokenizer


def behaviour(tokenizer: Any) -> list[object]:
    """A comparable description of a tokenizer as JSON values, apart from vocabulary, merges and special tokens.

    It excludes the post-processor, which every class takes from the file, and whether offsets count spaces.
    """
    splitting = [_state(part) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)]
    options = [getattr(tokenizer.model, name, None) or None for name in MODEL_OPTIONS]
    return [type(tokenizer.model).__name__, *options, type(tokenizer.decoder).__name__, *splitting]


def _state(part: Any) -> dict[str, object] | None:
    if part is None:
        return None
    state: dict[str, object] = json.loads(part.__getstate__())
    return {key: value for key, value in state.items() if key != "trim_offsets"}


#: By ``Family.tokenizer``.
KINDS: Mapping[str, Kind] = {
    "byte-level": Kind(
        tokenizer_class="GPT2Tokenizer",
        classes=("GPT2Tokenizer", "CodeGenTokenizer"),
        named={"bos_token": END, "eos_token": END, "unk_token": END},
        vocabulary=("encoder.json", "vocab.json"),
        merges=("vocab.bpe", "merges.txt"),
        alphabet=_byte_alphabet,
        build=_byte_level,
        settings={"add_prefix_space": False, "clean_up_tokenization_spaces": False, "errors": "replace"},
    ),
    "word-end": Kind(
        tokenizer_class="OpenAIGPTTokenizer",
        classes=("OpenAIGPTTokenizer",),
        named={"unk_token": UNKNOWN},
        vocabulary=("encoder_bpe_40000.json", "vocab.json"),
        merges=("vocab_40000.bpe", "merges.txt"),
        alphabet=lambda settings: (_unknown(settings),),
        build=_word_end,
        settings={"clean_up_tokenization_spaces": False},
    ),
}


def kind_of(class_name: str | None, family: str) -> Kind:
    """The kind of BPE of a tokenizer class, without ``Fast``; that of the family if the class is neither kind's."""
    return next((kind for kind in KINDS.values() if class_name in kind.classes), KINDS[family])


#: The same as ``Kind.settings``, for tokenizers of other kinds. By default the class of transformers 4 also returns
#: token types, which ``generate`` rejects.
OTHER_SETTINGS: Settings = {
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}
