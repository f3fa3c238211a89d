"""The metadata of a GGUF file: what llama.cpp needs to compute the model, and what programs show of it."""

from __future__ import annotations

from gptconvert.containers.gguf import Value
from gptconvert.families.registry import family_named
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.targets.gguf.layout import ARCHITECTURES
from reference_model.config import GPTConfig

#: Type of a file → llama.cpp's number for it (``llama_ftype``).
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q5_0": 8, "Q4_0": 2}
#: Version of the block types.
QUANTISATION = 2


def architecture_metadata(config: GPTConfig) -> dict[str, Value]:
    """The keys that determine what is computed. ``config`` is that of :func:`.layout.as_computed`."""
    architecture = ARCHITECTURES[config.family]
    keys: dict[str, Value] = {
        "context_length": config.n_ctx,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.norm_eps),
    }
    rotary = config.rotary
    if rotary is not None:
        keys |= {"rope.dimension_count": rotary.width, "rope.freq_base": float(rotary.base)}
        if rotary.scaling is not None and rotary.scaling.kind == "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rotary.scaling.factor)}
    if architecture.name == "gptneox":
        keys["use_parallel_residual"] = config.residual == "parallel"
    return {f"{architecture.name}.{key}": value for key, value in keys.items()}


def general_metadata(checkpoint: Checkpoint, kind: str) -> dict[str, Value]:
    """The keys for people and programs that list models. ``kind`` is the type of the file (``Q4_0``)."""
    config, card = checkpoint.config, checkpoint.source.card
    architecture, title = ARCHITECTURES[config.family].name, family_named(config.family).title
    keys: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": model_name(checkpoint) or title.partition(",")[0],
    }
    if architecture == "phi2":
        keys["general.description"] = f"{title}, stored as phi2, whose graph in llama.cpp computes it"
    if isinstance(licence := card.get("license"), str):
        keys["general.license"] = licence
    keys["general.file_type"] = FILE_TYPES[kind]
    keys["general.quantization_version"] = QUANTISATION
    return keys


def model_name(checkpoint: Checkpoint) -> str | None:
    """The model's name: that of its hub repository, or in its model card. A local directory's does not count."""
    name = checkpoint.source.repo or checkpoint.source.card.get("model_name")
    return name.rpartition("/")[2].strip() or None if isinstance(name, str) else None
