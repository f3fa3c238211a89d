"""config.json round trips: a written file reads as the same configuration, however the original was spelled."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert import families
from gptconvert.families.family import Family, ReadConfig
from gptconvert.families.keys import ACTIVATION, SUMMARY_KEYS
from gptconvert.families.registry import FAMILIES, family_named
from gptconvert.model.config_kinds import SIZE, TOKEN
from gptconvert.model.config_table import FIELDS, SPECIAL_IDS, USUAL, ConfigTable, Key
from gptconvert.model.options import Options
from reference_model.config import GPTConfig
from tests.families.configs import VARIED, any_config, configs

NAMES = tuple(family.name for family in FAMILIES)
#: Harmless keys that also determine the task, the number of labels or the choice scores.
MEANINGFUL = {"architectures", "id2label", "num_labels", "_num_labels", "label2id", "model_type", *SUMMARY_KEYS}
JSON = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text("ab", max_size=3)
    | st.lists(st.integers(0, 9), max_size=2)
)
IDS = st.integers(-1, 200)
SEVERAL_IDS = st.lists(IDS, min_size=2, max_size=3)
#: Activation → other names of the same formula.
SYNONYMS = {
    "gelu_new": ("gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"),
    "gelu": ("gelu_python",),
    "silu": ("swish",),
}


def read(family: Family, raw: dict[str, object], task: str) -> ReadConfig:
    """Read ``raw`` from JSON. A bare body must be requested: it could count as a language model."""
    options = Options(task=task if task == "feature-extraction" else None)
    return family.read_config("hf", json.loads(json.dumps(raw)), "config.json", {}, options)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_written_configurations_round_trip(name: str, data: Any) -> None:
    config = data.draw(configs(name))
    family = family_named(name)
    ids = {"bos_token_id": data.draw(st.none() | IDS), "eos_token_id": data.draw(st.none() | IDS | SEVERAL_IDS)}
    written = family.write_config(config, ids)
    found = read(family, written, config.task)
    assert found.config == config
    assert {key: found.carried[key] for key in ids} == ids
    assert family.write_config(found.config, found.carried) == written


def respelled(draw: Any, family: Family, config: GPTConfig) -> dict[str, object]:
    """config.json of ``config`` with aliases, synonyms, omitted optional keys and added harmless keys."""
    raw: dict[str, Any] = family.write_config(config, {})
    flat = {key: value for key, value in raw.items() if not isinstance(value, dict) or key == "id2label"}
    for key in family.keys.keys:
        outer, _, inner = key.name.rpartition(".")
        if key.name not in flat and not (outer and inner in raw.get(outer, {})):
            continue  # read but not written
        value = raw[outer][inner] if outer else flat.pop(key.name)
        for name in key.names:
            flat.pop(name, None)
        name = draw(st.sampled_from(key.names))
        target, _, inner = name.rpartition(".")
        place = flat.setdefault(target, {}) if target else flat
        place[inner] = _respelled_value(draw, key, value, config)
    flat |= draw(st.dictionaries(st.sampled_from(sorted({*family.keys.harmless} - MEANINGFUL)), JSON, max_size=4))
    off = draw(st.lists(st.sampled_from(sorted(family.keys.unused)), max_size=3))
    return {**flat, **{key: family.keys.unused[key] for key in off}}


def _respelled_value(draw: Any, key: Key, value: Any, config: GPTConfig) -> object:
    if key.kind is TOKEN and value is not None:
        return draw(st.sampled_from([value, [value, 5]]))
    if key.kind is SIZE and value is None:
        return draw(st.sampled_from([None, 4 * config.n_embd])) if key.field == "n_inner" else None
    if key.kind is ACTIVATION:
        return draw(st.sampled_from([value, *SYNONYMS.get(value, ())]))
    return value


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_key_keeps_its_meaning(name: str, data: Any) -> None:
    """Holds for every alias and synonym, nested or not; harmless keys are carried over unchanged."""
    config = data.draw(configs(name))
    family = family_named(name)
    raw = data.draw(st.composite(respelled)(family, config))
    found = read(family, raw, config.task)
    assert found.config == config
    written = family.write_config(found.config, found.carried)
    assert read(family, written, config.task).config == config
    untouched = {key for key in raw if key in family.keys.harmless and key not in MEANINGFUL}
    assert untouched <= written.keys()
    assert all(written[key] == raw[key] for key in untouched)
    spelled = {key.name for key in family.keys.keys if key.kind is ACTIVATION}
    assert all(written[key] == raw[key] for key in spelled)


@given(any_config(), st.data())
@settings(max_examples=100, deadline=None)
def test_different_configurations_give_different_files(config: GPTConfig, data: Any) -> None:
    other = data.draw(configs(config.family))
    family = family_named(config.family)
    same = family.write_config(config, {}) == family.write_config(other, {})
    assert same == (config == other)


# --- tables --------------------------------------------------------------------------------------------------------


def tables() -> Iterator[Any]:
    """Every table of every family, including the trainers'."""
    for found in pkgutil.walk_packages(families.__path__, "gptconvert.families."):
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if isinstance(value, ConfigTable):
                yield pytest.param(value, id=f"{found.name.removeprefix('gptconvert.families.')}.{name}")


TABLES = tuple(tables())


def test_all_tables_are_found() -> None:
    readers = {getattr(layout.read, "func", layout.read) for family in FAMILIES for layout in family.trainers}
    modules = {str(table.id).rpartition(".")[0] for table in TABLES}
    trainers = {reader.__module__.removeprefix("gptconvert.families.") for reader in readers}
    assert modules == {family.name for family in FAMILIES} | trainers
    assert set(NAMES) == set(VARIED)


@pytest.mark.parametrize("table", TABLES)
def test_no_key_is_in_two_lists(table: ConfigTable) -> None:
    names = [name for key in table.keys for name in key.names]
    assert len(names) == len(set(names))
    assert not table.handled & {*table.harmless}
    assert not table.handled & table.unused.keys()
    assert not table.unused.keys() & {*table.harmless}
    assert table.writes.keys() <= {*table.harmless} | table.unused.keys()
    assert all(table.writes[key] == value for key, value in table.unused.items() if key in table.writes)


@pytest.mark.parametrize("table", TABLES)
def test_every_field_is_set(table: ConfigTable) -> None:
    """Derived fields exist, and each field is set by only one key."""
    fields = [key.field for key in table.keys if key.field is not None]
    assert len(fields) == len(set(fields))
    assert {*table.derived, *USUAL} <= FIELDS | SPECIAL_IDS.keys()
    assert {"n_ctx", "n_embd", "n_layer", "n_head"} <= {*fields}
