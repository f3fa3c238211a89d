"""Untrusted YAML: one meaning, or an error."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptconvert.containers.yaml import read_yaml_configs
from gptconvert.errors import GptConvertError, InputError, UnsafeInputError

pytestmark = pytest.mark.usefixtures("no_hang")


def read(tmp_path: Path, *texts: str) -> dict[str, object]:
    paths = []
    for i, text in enumerate(texts):
        paths.append(str(tmp_path / f"{i}.yml"))
        Path(paths[-1]).write_text(text)
    return read_yaml_configs(paths)


def test_spellings_and_files_are_merged(tmp_path: Path) -> None:
    assert read(
        tmp_path, '{"num-layers": 2, # comment\n "fp16": {"loss-scale": 0,},}', "hidden_size: 24\nnum_layers: 2\n"
    ) == {"num_layers": 2, "fp16": {"loss-scale": 0}, "hidden_size": 24}


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("2E+3", 2000.0), ("1e5x", "1e5x")])
def test_numbers_with_exponents(tmp_path: Path, text: str, value: object) -> None:
    assert read(tmp_path, f"layernorm-epsilon: {text}") == {"layernorm_epsilon": value}


@pytest.mark.parametrize(
    ("texts", "kind", "words"),
    [
        (["a: 1", "a: 2"], InputError, r"two values for one key; expected 1 as in 0\.yml, found 2"),
        (["a: 1\na: 2"], InputError, "duplicate key a"),
        (["a-b: 1\na_b: 1"], InputError, "duplicate key, written with - and with _"),
        (["x: &x [1]\ny: *x"], UnsafeInputError, "aliases"),
        (["x: " + "[" * 40 + "]" * 40], UnsafeInputError, "nested more than 32 deep"),
        (["!!python/object/apply:os.system ['true']"], InputError, "not YAML"),
        (["{a: 1\n b: 2}"], InputError, r"not YAML: .* \(line 2, column 3\)"),
        (["- 1"], InputError, "expected a mapping"),
        (["1: 2"], InputError, "expected a mapping"),
        ([""], InputError, "found NoneType"),
        (["a: 2020-99-99"], InputError, "not YAML"),
        (["a: \x01"], InputError, "not YAML"),
    ],
)
def test_refused(tmp_path: Path, texts: list[str], kind: type[GptConvertError], words: str) -> None:
    with pytest.raises(kind, match=words):
        read(tmp_path, *texts)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="a:- \n{}[]&*!'\"#%|>?,0e.", max_size=40))
def test_noise_raises_only_gptconvert_errors(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    with contextlib.suppress(GptConvertError):
        read(tmp_path_factory.mktemp("yaml"), text)
