"""The commands named after a checkpoint format: their options and help.

``reads`` repeats ``Format.accepts``, since importing the readers would slow down ``--help``; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FormatCommand:
    """One command.

    Attributes:
        about: first line of its help.
        epilog: last part of its help.
        reads: source and checkpoint options that apply to the format, besides :data:`ALWAYS`.
    """

    about: str
    epilog: str
    reads: frozenset[str]


#: Options that apply to every local checkpoint.
ALWAYS = frozenset({"task", "trim_vocab"})
#: Options of downloads; only ``hf`` downloads.
HUB = frozenset({"revision", "cache_dir", "offline"})

#: Options of formats that have a configuration and name their tensors.
EDITS = frozenset({"ignore_key", "ignore_tensor", "set_key"})

FORMAT_COMMANDS: Mapping[str, FormatCommand] = {
    "openai-tf": FormatCommand(
        "Convert the OpenAI checkpoint SOURCE.",
        """\b
SOURCE is a prefix (model.ckpt), a directory, the `checkpoint` file or the
.index file. Directories written by gpt-2-simple and nshepperd's fork work
too, as does GPT-1's directory (params_0.npy …).

\b
Example:
  gptconvert openai-tf ./models/124M --to onnx --to safetensors -o gpt2
""",
        frozenset({"step", "hparams", "n_head", "scope"}) | EDITS,
    ),
    "hf": FormatCommand(
        "Convert the Hugging Face checkpoint SOURCE: a directory or a hub repository.",
        """\b
SOURCE is a directory, a weights file with config.json beside it, or a hub
repository. The access token is that of HF_TOKEN or `hf auth login`. Code in
repositories is never run, and pickles are never executed. A LoRA adapter
is merged with --adapter, or is SOURCE itself with --base.

\b
Examples:
  gptconvert hf distilgpt2 --to onnx -o distilgpt2-onnx
  gptconvert hf ./my-lora --base gpt2 --to onnx
""",
        frozenset({"hparams", "weights_file", "pad_token_id", "scope", "adapter", "base"}) | HUB | EDITS,
    ),
    "mesh-tf": FormatCommand(
        "Convert GPT-Neo's original checkpoint SOURCE.",
        """\b
SOURCE is a prefix, a directory, the `checkpoint` file or the .index file,
with the model's config.json beside it (or --hparams FILE).

\b
Example:
  gptconvert mesh-tf ./GPT3_XL --to onnx
""",
        frozenset({"step", "hparams"}) | EDITS,
    ),
    "mesh-jax": FormatCommand(
        "Convert GPT-J's original checkpoint SOURCE.",
        """\b
SOURCE is the directory that contains shard_0 …, or the one that contains
step_N. Without the JSON file of the training run or --hparams FILE, a
checkpoint with the sizes of GPT-J 6B is read as GPT-J 6B.

\b
Example:
  gptconvert mesh-jax ./step_383500 --to safetensors --dtype fp16
""",
        frozenset({"step", "hparams"}) | EDITS,
    ),
    "neox": FormatCommand(
        "Convert the GPT-NeoX checkpoint SOURCE.",
        """\b
SOURCE is the directory of a run (with `latest` and configs/) or of a single
step. The files of all ranks must be present. The configuration is
configs/*.yml, or --hparams FILE. The vocabulary stays padded unless
--trim-vocab is given.

\b
Example:
  gptconvert neox ./20B_checkpoints --to safetensors
""",
        frozenset({"step", "hparams"}) | EDITS,
    ),
    "nanogpt": FormatCommand(
        "Convert the nanoGPT checkpoint SOURCE.",
        """\b
SOURCE is a ckpt.pt or its directory. The file does not record which GELU
the model was trained with: erf since June 2023, tanh before. Its pickle is
parsed without executing it; meta.pkl is not opened.

\b
Example:
  gptconvert nanogpt ./out-shakespeare/ckpt.pt --to onnx --activation erf
""",
        frozenset({"weights_file", "n_head", "activation"}) | EDITS,
    ),
    "llmc": FormatCommand(
        "Convert the llm.c model SOURCE.",
        """\b
SOURCE is a model file of version 1, 3 or 5 (gpt2_124M.bin,
gpt2_124M_bf16.bin, log124M/model_00018865.bin) or a directory that contains
one; if it contains several, choose with --weights-file. Padding rows of the
vocabulary are dropped.

\b
Example:
  gptconvert llmc gpt2_124M_bf16.bin --to safetensors
""",
        frozenset({"weights_file"}),
    ),
    "megatron": FormatCommand(
        "Convert the Megatron-LM GPT-2 checkpoint SOURCE.",
        """\b
SOURCE is a model_optim_rng.pt, its mp_rank_00, or the directory of a run.
The model must not have been split over devices, and the checkpoint version
must be 0 to 3.

\b
Example:
  gptconvert megatron ./release/mp_rank_00/model_optim_rng.pt --to onnx
""",
        frozenset({"step", "n_head", "activation"}) | EDITS,
    ),
    "gguf": FormatCommand(
        "Convert the GGUF file SOURCE of llama.cpp.",
        """\b
SOURCE is a GPT-2 or GPT-NeoX file with float weights (F32, F16, BF16), the
first of several such files, or a directory that contains one; if it
contains several models, choose with --weights-file. Quantised files are
refused. The tokenizer in the file is converted too. GGUF does not record
the GELU: tanh is assumed for GPT-2, erf for GPT-NeoX.

\b
Example:
  gptconvert gguf gpt2-F16.gguf --to safetensors
""",
        frozenset({"weights_file", "activation"}) | EDITS,
    ),
}
