"""Every family: read files that transformers saved, and write files that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families.family import Family
from gptconvert.families.registry import FAMILIES, family_named, understand
from gptconvert.model.options import Options
from gptconvert.model.resolution import tied_pairs
from gptconvert.model.schemes import canonical_shapes, expand, write_names
from gptconvert.targets.safetensors.plan import plan
from reference_model.config import TASKS
from tests.families import witness
from tests.families.witness import BY_TASK, CASES, Case, hf_outputs, inputs_of
from tests.helpers import checkpoint_of, computed_tensors, source_of, write_planned

NAMES = tuple(family.name for family in FAMILIES)
#: Extra keys of our config.json, for older readers; transformers ignores them.
OLDER = {"n_ctx", "rotary_pct", "rotary_emb_base", "attention_layers"}
#: Variant → key that transformers spells differently, with the same meaning.
SPELLED = {"upcast": "reorder_and_upcast_attn", "mixed": "attention_types"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def read(case: Case, directory: Path) -> Any:
    return witness.checkpoint(case, directory, Options(task=case.task))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_match_transformers(case: Case, directory: Path) -> None:
    """Every saved tensor is read, and written back with the same name and values."""
    _, arrays = witness.saved(case, directory)
    if (case.family, case.task) == ("gpt1", "multiple-choice"):  # transformers 4 cannot load the name that 5 saves
        arrays = {name.replace("lm_head", "transformer.tokens_embed"): array for name, array in arrays.items()}
    checkpoint = read(case, directory)
    assert not checkpoint.dropped
    bare = case.task == "feature-extraction"
    scheme = family_named(case.family).scheme("hf")
    written = write_names(scheme, checkpoint.config, checkpoint.weights, bare=bare)
    assert list(written) == sorted(arrays)
    assert all(np.array_equal(written[name].read(), arrays[name]) for name in arrays)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_model_has_the_same_parameters(case: Case, directory: Path) -> None:
    """Canonical names and shapes match those of the reference model."""
    from reference_model.model import GPT, canonical_name

    config = read(case, directory).config
    parameters = {canonical_name(name, config): tuple(p.shape) for name, p in GPT(config).named_parameters()}
    assert canonical_shapes(family_named(case.family).scheme("hf").rows, config) == parameters


@pytest.mark.parametrize("case", CASES, ids=str)
def test_config_json_keeps_the_meaning_of_transformers_file(case: Case, directory: Path) -> None:
    """transformers reads it as the configuration that it saved, including dropouts and label names."""
    checkpoint = read(case, directory)
    written = family_named(case.family).write_config(checkpoint.config, checkpoint.carried)
    kind = type(witness.hf_config(case))
    saved = kind.from_dict(witness.saved(case, directory)[0]).to_dict()
    written_back = kind.from_dict(json.loads(json.dumps(written))).to_dict()
    added = set(written_back) - set(saved)
    assert added <= OLDER
    ignored = added | {SPELLED.get(case.name)}
    for key in ignored:
        written_back.pop(key, None)
        saved.pop(key, None)
    assert written_back == saved
    again, _, _ = family_named(case.family).read_config(
        "hf", written, None, checkpoint.source.tensors, Options(task=case.task)
    )
    assert again == checkpoint.config


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transformers_loads_written_files(case: Case, directory: Path, tmp_path: Path) -> None:
    """No tensor is missing, unexpected or mis-shaped, and the outputs equal the original's."""
    import transformers

    checkpoint = read(case, directory)
    family = family_named(case.family)
    write_planned(tmp_path, plan(checkpoint, Options())[0].files)
    config = family.write_config(checkpoint.config, checkpoint.carried)
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = getattr(transformers, family.heads[case.task])
    model, report = kind.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = inputs_of(case.task)
    for name, expected in hf_outputs(case, inputs, witness.hf_model(case)).items():
        found = hf_outputs(case, inputs, model)[name]
        rounding = 1e-5 if case.name in SPELLED else 0
        assert np.allclose(found, expected, rtol=0, atol=rounding, equal_nan=True), name


@pytest.mark.parametrize("family", NAMES)
def test_old_files_with_buffers_and_other_prefixes(family: str, directory: Path) -> None:
    """Buffers saved as tensors are dropped by name, and other prefixes are accepted."""
    case = Case(family)
    raw, arrays = witness.saved(case, directory)
    extra = dict(arrays)
    body = family_named(family).scheme("hf").body
    buffers = {
        "gpt1": ["h.0.attn.bias"],
        "gpt2": ["h.1.attn.bias", "h.0.attn.masked_bias"],
        "gpt_neo": ["h.2.attn.attention.bias", "h.0.attn.attention.masked_bias"],
        "gptj": ["h.0.attn.bias", "h.1.attn.masked_bias", "h.0.attn.embed_positions"],
        "codegen": ["h.0.attn.causal_mask", "h.1.attn.embed_positions"],
        "gpt_neox": ["layers.0.attention.bias", "layers.1.attention.rotary_emb.inv_freq", "rotary_emb.inv_freq"],
    }[family]
    extra |= {body + name: np.zeros((1, 1, 4, 4), np.float32) for name in buffers}
    plain, old = (checkpoint_of(raw, some) for some in (arrays, extra))
    assert set(old.dropped) == {body + name for name in buffers}
    assert canonical_bytes(old) == canonical_bytes(plain)
    for prefix in ("", f"module.{body}"):
        renamed = {(prefix + n.removeprefix(body) if n.startswith(body) else n): a for n, a in arrays.items()}
        if prefix.startswith("module."):
            renamed = {n if n.startswith("module.") else f"module.{n}": a for n, a in renamed.items()}
        assert canonical_bytes(checkpoint_of(raw, renamed)) == canonical_bytes(plain)


def canonical_bytes(checkpoint: Any) -> dict[str, bytes]:
    return {name: weight.read().tobytes() for name, weight in checkpoint.weights.items()}


HEADS = ("lm_head.weight", "embed_out.weight")
TIED: dict[str, Any] = {"keys": {"tie_word_embeddings": True}, "name": "tied"}


@pytest.mark.parametrize(
    ("case", "name", "to"),
    [
        (Case("gpt1"), "lm_head.weight", "transformer.tokens_embed.weight"),
        (Case("gpt2"), "lm_head.weight", "transformer.wte.weight"),
        (Case("gpt_neo"), "lm_head.weight", "transformer.wte.weight"),
        (Case("gptj", **TIED), "lm_head.weight", "transformer.wte.weight"),
        (Case("codegen", **TIED), "lm_head.weight", "transformer.wte.weight"),
        (Case("gpt_neox", **TIED), "embed_out.weight", "gpt_neox.embed_in.weight"),
        (Case("gpt_neox", **TIED), "lm_head.weight", "gpt_neox.embed_in.weight"),
        (Case("gpt1", "multiple-choice"), "transformer.tokens_embed.weight", "lm_head.weight"),
    ],
    ids=str,
)
def test_a_tied_head_may_be_stored_too(case: Case, name: str, to: str, directory: Path) -> None:
    raw, arrays = witness.saved(case, directory)
    assert name not in arrays
    both = {**arrays, name: arrays[to]}
    checkpoint = checkpoint_of(raw, both)
    scheme = family_named(case.family).scheme("hf")
    pairs = tied_pairs(scheme, checkpoint.config, checkpoint.source.tensors, checkpoint.prefix)
    assert pairs == [(name if name in HEADS else to, "wte.weight")]
    assert canonical_bytes(checkpoint) == canonical_bytes(checkpoint_of(raw, arrays))


def test_neox_head_is_read_under_either_name(directory: Path) -> None:
    raw, arrays = witness.saved(Case("gpt_neox"), directory)
    renamed = {n.replace("embed_out", "lm_head"): a for n, a in arrays.items()}
    assert canonical_bytes(checkpoint_of(raw, renamed)) == canonical_bytes(checkpoint_of(raw, arrays))
    with pytest.raises(InputError, match=r"unexpected +lm_head\.weight"):
        checkpoint_of(raw, {**renamed, **arrays})


@pytest.mark.parametrize("under", ["transformer.tokens_embed.weight", "tokens_embed.weight"])
def test_gpt1_double_heads_with_the_embedding_under_its_own_name(under: str, directory: Path) -> None:
    case = Case("gpt1", "multiple-choice")
    raw, arrays = witness.saved(case, directory)
    renamed = {n.replace("lm_head.weight", under): a for n, a in arrays.items()}
    if under.startswith("tokens"):
        renamed = {n.removeprefix("transformer."): a for n, a in renamed.items()}
    assert canonical_bytes(checkpoint_of(raw, renamed)) == canonical_bytes(checkpoint_of(raw, arrays))


@pytest.mark.parametrize("family", NAMES)
def test_missing_and_misshaped_tensors_are_listed(family: str, directory: Path) -> None:
    raw, arrays = witness.saved(Case(family), directory)
    scheme = family_named(family).scheme("hf")
    lost = next(name for name in sorted(arrays) if "mlp" in name)
    with pytest.raises(InputError) as error:
        checkpoint_of(raw, {n: a for n, a in arrays.items() if n != lost})
    assert f"missing     {lost}" in str(error.value)
    with pytest.raises(InputError) as error:
        checkpoint_of(raw, {**arrays, lost: arrays[lost][:-1], f"{scheme.body}adapter.weight": arrays[lost]})
    assert f"wrong shape {lost}" in str(error.value)
    assert f"unexpected  {scheme.body}adapter.weight" in str(error.value)


@pytest.mark.parametrize("family", NAMES)
def test_tensor_names_suggest_the_family(family: str, directory: Path) -> None:
    """Without model_type the hint names the family; a wrong model_type is an error."""
    raw, arrays = witness.saved(Case(family), directory)
    nameless = {key: value for key, value in raw.items() if key != "model_type"}
    with pytest.raises(InputError) as error:
        understand(source_of(nameless, computed_tensors(arrays)), Options())
    assert f"look like {family}" in (error.value.hint or "")
    other = "gpt_neox" if family != "gpt_neox" else "gpt2"
    with pytest.raises((InputError, UnsupportedError)):
        understand(source_of({**nameless, "model_type": other}, computed_tensors(arrays)), Options())


def test_unknown_model_types_are_rejected_by_name() -> None:
    with pytest.raises(UnsupportedError, match="llama") as error:
        understand(source_of({"model_type": "llama"}, computed_tensors({})), Options())
    assert all(kind in (error.value.expected or "") for family in FAMILIES for kind in family.model_types)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_registry_is_consistent(family: Family) -> None:
    import transformers

    assert family.name in witness.TINY
    assert set(family.heads) <= set(TASKS)
    names = [scheme.name for scheme in family.schemes]
    assert len(names) == len(set(names))
    assert all(family.reads(name) and family.scheme(name).name == name for name in names)
    assert not family.reads("gguf")
    for architecture in family.heads.values():
        assert getattr(transformers, architecture).config_class.model_type in family.model_types
    modelling = {name for name in dir(transformers) if name in set(family.heads.values())}
    assert modelling == set(family.heads.values())


#: Suffixes of transformers' model classes.
KINDS = ("Model", "LM", "Classification", "QuestionAnswering")


def test_every_transformers_head_is_listed() -> None:
    """The families list every model class that transformers has for these model types."""
    for family in FAMILIES:
        classes = {n for n in dir(witness.module(family)) if n.endswith(KINDS) and not n.endswith("PreTrainedModel")}
        own = {n for n in classes if getattr(witness.module(family), n).__module__ == witness.module(family).__name__}
        assert own == set(family.heads.values())


@pytest.mark.parametrize("case", BY_TASK, ids=str)
def test_rows_with_the_same_canonical_name_are_exclusive(case: Case, directory: Path) -> None:
    """Several rows may have one canonical name, but at most one applies to a configuration."""
    config = read(case, directory).config
    for scheme in family_named(case.family).schemes:
        bound = [b.canonical for b in expand(scheme.rows, config)]
        assert len(bound) == len(set(bound))
