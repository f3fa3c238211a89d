"""What becomes of every entry of a checkpoint's directory, or of a hub repository.

An entry is ``read``, ``carried`` (copied byte for byte), ``not needed`` (it never changes what the model computes or
how it is used) or ``left behind``, which is a note. :data:`RULES` decides by name; an unknown name is left behind.
Files that must not be converted at all are refused where they are read.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from gptconvert.containers.untrusted import entries, hub_homes, is_regular, links_out
from gptconvert.model.options import Options
from gptconvert.model.source import Entry, Source
from gptconvert.sources.documents import CARD, MAX_LICENCE, is_document, is_licence, read_card
from gptconvert.sources.hf.adapter import LEFT_BEHIND
from gptconvert.sources.tokenizer_files import GPT1, GPT2, HUGGING_FACE, is_copied

READ, CARRIED, UNNEEDED, LEFT = "read", "carried", "not needed", "left behind"
#: Names listed in one note.
MAX_NAMES = 6


@dataclass(frozen=True)
class Rule:
    """The outcome of some entries.

    Attributes:
        outcome: :data:`READ`, :data:`CARRIED`, :data:`UNNEEDED` or :data:`LEFT`.
        reason: what such an entry is.
        patterns: of its name, separated by spaces; those of directories end with ``/``.
    """

    outcome: str
    reason: str
    patterns: str = ""

    def matches(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in self.patterns.split())


WEIGHTS = Rule(READ, "weights")
INDEX = Rule(READ, "index of the weights")
CONFIGURATION = Rule(READ, "configuration")
TOKENIZER = Rule(READ, "tokenizer or generation settings")
COPIED_TOKENIZER = Rule(CARRIED, "tokenizer")
METADATA = Rule(READ, "metadata for the model card")
LICENCE = Rule(CARRIED, "licence")
UNUSABLE = Rule(LEFT, "not a regular file, a link that leaves the directory, or too large")
SAME_WEIGHTS = Rule(
    LEFT,
    "the same or other weights",
    """model.safetensors pytorch_model.bin tf_model.h5 flax_model.msgpack model.safetensors.index.json
    pytorch_model.bin.index.json tf_model.h5.index.json flax_model.msgpack.index.json
    model-?????-of-?????.safetensors pytorch_model-?????-of-?????.bin tf_model-?????-of-?????.h5
    flax_model-?????-of-?????.msgpack""",
)
OTHER_WEIGHTS = Rule(
    LEFT, "other weights", "*.safetensors *.bin *.pt *.pth *.pkl *.ckpt *.h5 *.hdf5 *.msgpack *.ot *.index.json"
)
ADAPTER = Rule(LEFT, "a PEFT adapter, which changes the outputs", "adapter_config.json adapter_model.*")
REPLACED = Rule(UNNEEDED, "tokenizer, replaced by the adapter's", " ".join(HUGGING_FACE))
#: Entries that no reader uses. The first match wins; patterns are lower case.
RULES: tuple[Rule, ...] = (
    ADAPTER,
    Rule(
        LEFT,
        "pooling of sentence-transformers, which changes the embeddings",
        "modules.json sentence_*_config.json config_sentence_transformers.json",
    ),
    Rule(LEFT, "a quantisation, which changes the weights", "quantize_config.json quant_config.json"),
    Rule(LEFT, "further chat templates", "additional_chat_templates/"),
    Rule(LEFT, "a vocabulary stored as a pickle, which is not opened", "meta.pkl"),
    SAME_WEIGHTS,
    Rule(
        UNNEEDED,
        "state of the training",
        """optimizer.* optimizer_* scheduler.* scaler.pt rng_state* random_states* trainer_state.json training_args.*
        events.out.tfevents.* zero_to_fp32.py *optim_states.pt global_step*/ checkpoint-*/ training_config.*
        train_config.* hparams.* args.json graph.pbtxt *.meta
        counter mp_rank_*_model_states.pt""",
    ),
    Rule(UNNEEDED, "the name of a checkpoint", "checkpoint latest latest_checkpointed_iteration.txt meta.json"),
    Rule(UNNEEDED, "another checkpoint", "*.index *.data-?????-of-????? step_*/ iter_*/ release/"),
    Rule(
        UNNEEDED,
        "results or data",
        """*_results.json *_results.txt results.json metrics*.json eval*.json train*.txt eval*.txt *.log *.out *.err
        *.csv *.tsv *.jsonl *.parquet *.arrow *.npz *.npy""",
    ),
    Rule(
        UNNEEDED,
        "documentation",
        "*.md *.rst *.pdf *.png *.jpg *.jpeg *.gif *.svg *.webp *.mp4 *.html *.bib *.cff *.ipynb readme*",
    ),
    Rule(
        UNNEEDED,
        "a program or its settings",
        "*.py *.sh *.js *.toml *.lock *.cfg *.ini *.yml *.yaml requirements*.txt dockerfile makefile",
    ),
    Rule(
        UNNEEDED,
        "the model for another program",
        "rust_model.ot *.onnx *.onnx_data *.gguf *.ggml *.tflite *.mlmodel openvino_model.* *.pb genai_config.json",
    ),
    Rule(
        UNNEEDED,
        "version control, a system file or checksums",
        ".* thumbs.db desktop.ini manifest.json sha256sums *.sha256 *.md5",
    ),
    Rule(UNNEEDED, "another copy of the vocabulary or merges", " ".join((*GPT2[:4], *GPT1))),
    Rule(UNNEEDED, "replaced by --hparams", "config.json"),
    Rule(UNNEEDED, "a subdirectory, which loading does not read", "*/"),
    OTHER_WEIGHTS,
    Rule(LEFT, "not recognised", "*"),
)


def with_inventory(source: Source, path: str, options: Options) -> Source:
    """The source with its inventory, and with the documents and foreign tokenizer files beside it.

    A weights file given on its own, in a format that does not read the rest of its directory, has no inventory.

    Args:
        source: as its format read it.
        path: given by the user.
        options: the user's choices.

    Raises:
        InputError: the directory cannot be read.
    """
    folder = source.folder or (_folder(source.path) if os.path.isdir(path) else None)
    if folder is None:
        return source
    names = entries(folder, marked=True)
    beside = _usable_files(folder, filter(_is_beside, names))
    documents = {name: file for name, file in beside.items() if name == CARD or _is_small_licence(name, file)}
    card, notes = read_card(documents[CARD]) if CARD in documents else ({}, ())
    copied = {name: file for name, file in beside.items() if is_copied(name)}
    if source.adapter is not None and source.adapter.tokenizer:  # it replaces the base's tokenizer as a whole
        home = source.adapter.path
        copied = _usable_files(home, filter(is_copied, entries(home, files_only=True)))
    source = replace(source, folder=folder, tokenizer={**source.tokenizer, **copied}, documents=documents, card=card)
    read = {os.path.realpath(file) for file in source.files}
    found = {name: _rule(name, source, read) for name in source.listing or names}
    return replace(
        source,
        inventory=tuple(Entry(name, rule.outcome, rule.reason) for name, rule in found.items()),
        notes=(*source.notes, *notes, *_notes(found, source, options)),
    )


def _folder(path: str) -> str:
    """The directory of a checkpoint, which may be below the one that the user gave."""
    return path if os.path.isdir(path) else os.path.dirname(path) or "."


def _is_beside(name: str) -> bool:
    """Whether a file of this name is carried, for every format of weights."""
    return is_copied(name) or is_document(name)


def _is_small_licence(name: str, file: str) -> bool:
    return is_licence(name) and os.path.getsize(file) <= MAX_LICENCE


def _usable_files(folder: str, names: Iterable[str]) -> dict[str, str]:
    """Name → path of the regular files, without links by which a checkpoint could publish files of its reader."""
    homes = hub_homes(folder)
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: path for name, path in paths.items() if is_regular(path) and not links_out(path, homes)}


def _rule(name: str, source: Source, read: Collection[str]) -> Rule:
    """The rule for an entry; ``read`` holds the resolved paths of the files that are read."""
    if name in source.documents:
        return METADATA if name == CARD else LICENCE
    path = os.path.realpath(os.path.join(source.folder or "", name))
    if name in source.tokenizer and path in read:
        return COPIED_TOKENIZER if is_copied(name) else TOKENIZER
    if source.config_path is not None and path == os.path.realpath(source.config_path):
        return CONFIGURATION
    if path in read or (name.endswith("/") and any(file.startswith(path + os.sep) for file in read)):
        return WEIGHTS
    if name.endswith(".index.json"):
        stem, ending = os.path.splitext(name.removesuffix(".index.json"))
        shards = [file for file in map(os.path.basename, source.tensors.files) if file.startswith(f"{stem}-")]
        if any(file.endswith(ending) for file in shards):
            return INDEX
    if source.adapter is not None and source.adapter.tokenizer and (is_copied(name) or REPLACED.matches(name)):
        return REPLACED
    if _is_beside(name):
        return UNUSABLE
    return next(rule for rule in RULES if rule.matches(name))


def _notes(found: Mapping[str, Rule], source: Source, options: Options) -> list[str]:
    """One note per reason for which entries are left behind."""
    quiet = {OTHER_WEIGHTS} if options.weights_file else set()  # the user chose among them
    quiet |= {SAME_WEIGHTS} if source.scheme == "hf" else set()  # its reader notes them
    quiet |= {ADAPTER} if LEFT_BEHIND in source.notes else set()
    notes = []
    for rule in dict.fromkeys(found.values()):
        if rule.outcome == LEFT and rule not in quiet:
            names = [name for name, other in found.items() if other is rule]
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            notes.append(f"left behind: {', '.join(names[:MAX_NAMES])}{more} ({rule.reason})")
    return notes
