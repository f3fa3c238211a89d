"""The two kinds of BPE that GPTs use, as data: names of their files, special tokens, and how text is cut.

Byte-level (GPT-2 and after; Radford et al. 2019; openai/gpt-2 ``src/encoder.py``): a regular expression cuts the
text, and the UTF-8 bytes of the pieces are written as 256 printable characters. Every text can be encoded.

Word-end (GPT-1; Sennrich et al. 2016; openai/finetune-transformer-lm ``text_utils.py``): text is lower-cased and cut
into words and punctuation, the last symbol of each carries ``</w>``, and white space is gone. The original cuts with
spaCy (``tokenizer_gpt1``); here, as in transformers, with the rules of BERT's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Vocabulary = Mapping[str, int]
Merges = Sequence[tuple[str, str]]
Settings = Mapping[str, object]

END = "<|endoftext|>"
UNKNOWN = "<unk>"
WORD_END = "</w>"
#: transformers' class that uses a tokenizer.json as it is; its other classes take the vocabulary and the merges out
#: of the file and cut text by rules of their own.
WHOLE_FILE = "PreTrainedTokenizerFast"
#: What a BPE model may be told besides vocabulary and merges.
MODEL_OPTIONS = (
    "dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges"
).split()


@dataclass(frozen=True)
class Kind:
    """One kind of BPE.

    Attributes:
        tokenizer_class: transformers' name for it.
        named: its special tokens, by their keys in tokenizer_config.json.
        vocabulary: names its vocabulary file may have.
        merges: names its merges file may have.
        alphabet: symbols without which some text cannot be written.
        build: vocabulary, merges and the source's tokenizer_config.json → ``tokenizers.Tokenizer``, special tokens
            not yet in it.
        settings: what tokenizer_config.json says beyond the special tokens.
    """

    tokenizer_class: str
    named: Mapping[str, str]
    vocabulary: tuple[str, ...]
    merges: tuple[str, ...]
    alphabet: Callable[[Settings], Iterable[str]]
    build: Callable[[Vocabulary, Merges, Settings], Any]
    settings: Settings

    @property
    def end(self) -> str | None:
        """The token that ends a text; GPT-1 has none."""
        return self.named.get("eos_token")

    def describes(self, tokenizer: Any, settings: Settings) -> bool:
        """Whether ``tokenizer`` cuts and merges as ``tokenizer_class`` does when it is told ``settings``."""
        tokens = [*self.named.values(), *(_text(settings.get(key)) for key in self.named)]
        vocabulary = {token: number for number, token in enumerate(dict.fromkeys(filter(None, tokens)))}
        return _behaviour(self.build(vocabulary, (), settings)) == _behaviour(tokenizer)


def _text(token: object) -> str | None:
    """A special token's text; files hold it bare or with its stripping rules."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _byte_alphabet(_: Settings) -> list[str]:
    """The 256 characters that stand for bytes."""
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
    return _text(settings.get("unk_token")) or UNKNOWN


def _word_end(vocabulary: Vocabulary, merges: Merges, settings: Settings) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = _unknown(settings)
    model = models.BPE(
        vocab=dict(vocabulary),
        merges=list(merges),
        end_of_word_suffix=WORD_END,
        unk_token=unknown if unknown in vocabulary else None,  # the library refuses text if it is not there
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # and so without accents
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix=WORD_END)
    return tokenizer


def _behaviour(tokenizer: Any) -> tuple[object, ...]:
    """What a tokenizer does to text, apart from vocabulary, merges and special tokens; comparable.

    Not a part of it: the post-processor, which every class takes from the file, and whether offsets count spaces.
    """
    cutting = tuple(_state(part) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer))
    options = tuple(getattr(tokenizer.model, name, None) or None for name in MODEL_OPTIONS)
    return (type(tokenizer.model).__name__, *options, type(tokenizer.decoder).__name__, *cutting)


def _state(part: Any) -> dict[str, object] | None:
    if part is None:
        return None
    state: dict[str, object] = json.loads(part.__getstate__())
    return {key: value for key, value in state.items() if key != "trim_offsets"}


#: By ``Family.tokenizer``.
KINDS: Mapping[str, Kind] = {
    "byte-level": Kind(
        tokenizer_class="GPT2Tokenizer",
        named={"bos_token": END, "eos_token": END, "unk_token": END},
        vocabulary=("encoder.json", "vocab.json"),
        merges=("vocab.bpe", "merges.txt"),
        alphabet=_byte_alphabet,
        build=_byte_level,
        settings={"add_prefix_space": False, "clean_up_tokenization_spaces": False, "errors": "replace"},
    ),
    "word-end": Kind(
        tokenizer_class="OpenAIGPTTokenizer",
        named={"unk_token": UNKNOWN},
        vocabulary=("encoder_bpe_40000.json", "vocab.json"),
        merges=("vocab_40000.bpe", "merges.txt"),
        alphabet=lambda settings: (_unknown(settings),),
        build=_word_end,
        settings={"clean_up_tokenization_spaces": False},
    ),
}
#: What tokenizer_config.json says where the tokenizer is of no kind above.
OTHER_SETTINGS: Settings = {"clean_up_tokenization_spaces": False}
