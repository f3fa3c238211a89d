"""Which key of config.json wins: the reference model against transformers in float64, on old and new files.

transformers 5 is the witness. Where version 4.57 reads a file differently, the row says how, as observed in that
version's models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gptconvert.errors import InputError
from gptconvert.families.registry import family_named
from gptconvert.model.options import Options
from reference_model.config import Rotary
from tests.families import witness
from tests.helpers import checkpoint_of

#: Largest difference in float64, relative to the largest output.
TOLERANCE = 1e-10


@dataclass(frozen=True)
class File:
    """A config.json, and what is known about it.

    Attributes:
        family: registry name.
        keys: keys that override :data:`witness.TINY`; ``...`` removes a key.
        note: part of the note for the user; None: no note.
        four: how transformers 4.57 reads it, if differently.
    """

    family: str
    keys: dict[str, Any] = field(hash=False)
    note: str | None = None
    four: str | None = None

    def __str__(self) -> str:
        return f"{self.family}-{self.keys}"

    @property
    def raw(self) -> dict[str, Any]:
        family = family_named(self.family)
        raw = {
            "model_type": family.model_types[0],
            "architectures": [family.heads["text-generation"]],
            **witness.TINY[self.family],
            **self.keys,
        }
        return {key: value for key, value in raw.items() if value is not ...}


OLD = {"rope_parameters": ..., "rotary_pct": 0.5, "rotary_emb_base": 500}
NEW = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
DEFAULTS = "the defaults, 0.25 and 10000"


def neox(note: str | None = None, four: str | None = None, **keys: Any) -> File:
    return File("gpt_neox", {"rope_parameters": ..., **keys}, note, four)


NEOX = (
    neox(),
    neox(**OLD),
    neox(rotary_pct=1.0),
    neox(rotary_emb_base=9, rotary_pct=0.5),
    neox("rope_theta = 500.0 is ignored", rope_theta=500.0),
    neox("partial_rotary_factor = 0.5 is ignored", partial_rotary_factor=0.5),
    neox("rope_theta = 9.0 is ignored", **OLD, rope_theta=9.0, partial_rotary_factor=1.0),
    neox(**OLD, rope_theta=500, partial_rotary_factor=0.5),
    neox(rope_parameters=NEW, four=DEFAULTS),
    neox(rope_parameters={"rope_theta": 500.0}, four=DEFAULTS),
    neox(rope_parameters={"partial_rotary_factor": 0.5, "type": "default"}, four=DEFAULTS),
    neox(rope_parameters={"rope_type": "default"}, rotary_pct=0.5, rotary_emb_base=500),
    neox(rope_parameters={}, rotary_pct=0.5),
    neox(rope_parameters=None, rotary_pct=0.5),
    neox(rope_parameters=NEW, rotary_pct=0.5, rotary_emb_base=500),
    neox("rotary_pct = 1.0 is ignored", rope_parameters=NEW, rotary_pct=1.0, four="rotary_pct and 10000"),
    neox("rotary_emb_base = 77 is ignored", rope_parameters=NEW, rotary_emb_base=77, four="0.25 and rotary_emb_base"),
    neox("rope_theta = 77.0 is ignored", rope_parameters={"partial_rotary_factor": 0.5}, rope_theta=77.0),
    neox("rope_parameters.factor = 2.0 has no effect", rope_parameters={**NEW, "factor": 2.0}, four=DEFAULTS),
    neox(rope_parameters={**NEW, "factor": None}, four=DEFAULTS),
    neox(rope_parameters={**NEW, "type": "linear"}, four=DEFAULTS),
    neox(rope_scaling=None, **OLD),
    neox(rope_scaling={}, **OLD, four="an error"),
    neox(rope_scaling={"type": "default"}),
    neox(rope_scaling={"type": "default"}, **OLD),
    neox(rope_scaling={"rope_type": "default"}, rotary_pct=0.5),
    neox("rope_scaling.factor = 2.0 has no effect", rope_scaling={"type": "default", "factor": 2.0}, rotary_pct=0.5),
    neox(rope_scaling={"rope_type": "default", "rope_theta": 500.0}, rotary_pct=0.5, four="0.5 and 10000"),
    neox("rope_parameters is ignored", rope_scaling={"type": "default"}, rope_parameters=NEW),
    neox("n_ctx = 7 is ignored", n_ctx=7),
    neox(n_ctx=40, n_positions=40),
)
GPTJ = (
    File("gptj", {"n_ctx": 7}, "n_ctx = 7 is ignored"),
    File("gptj", {"n_ctx": 40}),
    File("gptj", {"rope_theta": 500.0}, "rope_theta = 500.0 is ignored"),
    File("gptj", {"rope_theta": 10000, "rotary_pct": 0.5, "rope_scaling": None}),
    File("gptj", {"rotary_pct": 1.0, "rotary_emb_base": 9}, "rotary_emb_base = 9 is ignored"),
    File("gptj", {"partial_rotary_factor": 1.0}, "partial_rotary_factor = 1.0 is ignored"),
    File("gptj", {"rope_scaling": {"type": "default"}}),
    File("gptj", {"num_attention_heads": 6}, "n_head = 3 is ignored: num_attention_heads = 6 is used"),
    File("codegen", {"rope_theta": 500.0}, "rope_theta = 500.0 is ignored"),
    File("codegen", {"num_attention_heads": 8, "rotary_dim": 2}, "n_head = 4 is ignored"),
)
GPT2 = (
    File("gpt2", {"n_ctx": 39}, "n_ctx = 39 is ignored: n_positions = 40 is used, the size of the position table"),
    File("gpt2", {"n_ctx": 40, "n_positions": 40}),
    File("gpt2", {"max_position_embeddings": 31}, "n_positions = 40 is ignored: max_position_embeddings = 31"),
    File("gpt2", {"max_position_embeddings": 40, "n_ctx": 1024}, "n_ctx = 1024 is ignored"),
    File("gpt2", {"hidden_size": 30, "n_head": 5}, "n_embd = 24 is ignored: hidden_size = 30 is used"),
    File("gpt2", {"num_hidden_layers": 3, "num_attention_heads": 6}, "n_layer = 2 is ignored"),
    File("gpt2", {"layer_norm_epsilon": 0.0}),
    File("gpt2", {"layer_norm_epsilon": 2.5}),
    File("gpt2", {"classifier_dropout": 0.3, "hidden_dropout": 0.3, "is_decoder": True}),
    File("gpt2", {"rope_scaling": {"type": "default"}, "mystery": None}),
    File("gpt1", {"num_attention_heads": 6, "max_position_embeddings": 31}, "n_positions = 40 is ignored"),
)
LOCAL = ["local"] * 3
NEO = (
    File("gpt_neo", {"attention_layers": LOCAL}, "attention_layers is used"),
    File("gpt_neo", {"attention_layers": ["global", "local", "local"]}),
    File("gpt_neo", {"attention_layers": LOCAL, "attention_types": ...}, four="an error"),
    File(
        "gpt_neo",
        {"attention_layers": LOCAL, "attention_types": [[["global"], 7]]},
        "attention_layers is used",
        "an error",
    ),
    File("gpt_neo", {"num_attention_heads": 6}, "num_heads = 3 is ignored"),
    File("gpt_neo", {"n_ctx": 9, "n_positions": 9}, "n_ctx = 9 is ignored"),
    File("gpt_neo", {"window_size": 0, "attention_types": [[["global"], 3]]}),
    File("gpt_neo", {"window_size": -1, "attention_types": [[["global"], 3]]}),
    File("gpt_neo", {"window_size": 1}),
    File("gpt_neo", {"layer_norm_epsilon": 0.0}),
)
FILES = (*NEOX, *GPTJ, *GPT2, *NEO)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return witness.inputs_of("text-generation")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_reference_model_reads_a_file_as_transformers(file: File, inputs: dict[str, Any], tmp_path: Path) -> None:
    with witness.in_float64():
        model = witness.hf_model_of(file.family, file.raw)
    arrays = {name: weight.numpy() for name, weight in model.state_dict().items()}
    checkpoint = checkpoint_of(file.raw, arrays)
    ours = witness.our_outputs(witness.reference(checkpoint), inputs)
    theirs = witness.hf_outputs(witness.Case(file.family), inputs, model)
    assert witness.gap(ours, theirs, inputs["attention_mask"]) < TOLERANCE
    notes = [note for note in checkpoint.notes if "ignored" in note or "is used" in note or "no effect" in note]
    assert bool(notes) == (file.note is not None), notes
    assert file.note is None or any(file.note in note for note in notes), notes


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_written_file_holds_the_values_that_were_read(file: File) -> None:
    """The exported config.json repeats no key that another one overrides."""
    family = family_named(file.family)
    read = family.read_config("hf", file.raw, "config.json", {}, Options())
    written = family.write_config(read.config, read.carried)
    again = family.read_config("hf", written, "config.json", {}, Options())
    assert again.config == read.config
    assert again.notes == []


def test_the_position_table_decides_between_n_ctx_and_n_positions() -> None:
    import numpy as np

    from tests.helpers import computed_tensors

    family = family_named("gpt2")
    for rows, expected in ((513, 513), (512, 512), (40, 513)):
        found = computed_tensors({"transformer.wpe.weight": np.zeros((rows, 24), np.float32)})
        raw = {**witness.TINY["gpt2"], "model_type": "gpt2", "n_positions": 513, "n_ctx": 512}
        read = family.read_config("hf", raw, "config.json", found, Options())
        assert read.config.n_ctx == expected
        assert len(read.notes) == 1


@pytest.mark.parametrize("layers", [["local"] * 2, ["local", "local", "sparse"], "local"])
def test_neo_layers_that_no_version_reads_are_rejected(layers: object) -> None:
    file = File("gpt_neo", {"attention_layers": layers})
    with pytest.raises(InputError, match="contradict") as error:
        family_named("gpt_neo").read_config("hf", file.raw, "config.json", {}, Options())
    assert "--ignore-key attention_layers" in str(error.value.hint)


def test_neox_rotary_values_of_a_file_with_all_keys() -> None:
    file = neox(rope_parameters=NEW, rotary_pct=1.0, rotary_emb_base=77, rope_theta=5.0)
    read = family_named("gpt_neox").read_config("hf", file.raw, "config.json", {}, Options())
    assert read.config.rotary == Rotary(4, 500.0)
    assert len(read.notes) == 3
