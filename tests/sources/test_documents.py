"""The metadata of a model card, written by strangers."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptconvert.sources.documents import is_licence, read_card

pytestmark = pytest.mark.usefixtures("no_hang")


def card(tmp_path: Path, text: str) -> tuple[dict[str, object], tuple[str, ...]]:
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    return read_card(str(path))


def test_known_keys_are_read(tmp_path: Path) -> None:
    text = """---
language: [sv, 'no', en]
license: mit
license_link: LICENSE
base_model: org/base
tags:
- poetry
- pytorch
datasets: [wiki]
model-index:
- name: my-run
  results: []
widget: [{text: hello}]
---
# Title
"""
    found, notes = card(tmp_path, text)
    assert notes == ()
    assert found == {
        "model_name": "my-run",
        "license": "mit",
        "license_link": "LICENSE",
        "language": ["sv", "no", "en"],
        "base_model": "org/base",
        "datasets": ["wiki"],
        "tags": ["poetry", "pytorch"],
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlanguage: no\n---\n", {"language": "no"}),
        ("---\nlanguage: [no, en]\n---\n", {"language": ["no", "en"]}),
        ("---\r\nlicense: mit\r\n---\r\ntext", {"license": "mit"}),
        ("\ufeff---\nlicense: mit\n---", {"license": "mit"}),
        ("---\nmodel_name: a\nmodel-index: [{name: b}]\n---\n", {"model_name": "a"}),
        ("# no front matter\n---\nlicense: mit\n---\n", {}),
        ("---\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\n- a list\n---\n", {}),
        ("", {}),
        # wrong types
        (
            "---\nlicense: {a: b}\nlanguage: 5\ntags: [1, {x: y}, good, null]\nmodel-index: [7]\n---\n",
            {"tags": ["good"]},
        ),
        ("---\nlicense_name: [a]\nmodel_name: true\nmodel-index: {name: x}\nbase_model: 2020-01-01\n---\n", {}),
    ],
)
def test_forms_and_wrong_types(text: str, expected: dict[str, object], tmp_path: Path) -> None:
    assert card(tmp_path, text) == (expected, ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("---\na: [1\n---\n", "not YAML"),
        ("---\na: &x [1]\nb: *x\n---\n", "refused YAML aliases"),
        ("---\na: !!python/object/apply:os.system ['true']\n---\n", "not YAML"),
        ("---\na: " + "[" * 50 + "]" * 50 + "\n---\n", "refused YAML nested"),
        ("---\nlicense: mit\nlicense: gpl\n---\n", "duplicate key"),
        ("---\na: " + "x" * (1 << 18) + "\n---\n", "longer than 131072 characters"),
        ("---\na: 1\n---\n" + "x" * (5 << 20), "too large"),
    ],
)
def test_a_fault_is_a_note(text: str, reason: str, tmp_path: Path) -> None:
    found, notes = card(tmp_path, text)
    assert found == {}
    assert len(notes) == 1
    assert reason in notes[0]


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_card(str(path)) == ({}, ("the metadata of README.md was left behind: not UTF-8",))


def test_many_keys_are_read_in_linear_time(tmp_path: Path) -> None:
    found, _ = card(tmp_path, "---\n" + "".join(f"k{i}: 1\n" for i in range(10000)) + "license: mit\n---\n")
    assert found == {"license": "mit"}


def test_values_have_a_limit(tmp_path: Path) -> None:
    found, _ = card(tmp_path, f"---\nlicense: {'m' * 999}\ntags: [{', '.join(['t'] * 999)}]\n---\n")
    assert len(str(found["license"])) == 200
    assert found["tags"] == ["t"] * 100


@pytest.mark.parametrize(
    "name", ["LICENSE", "LICENCE.md", "license.txt", "COPYING", "NOTICE", "MODEL_LICENSE", "UNLICENSE", "LICENSE-MIT"]
)
def test_names_of_licences(name: str) -> None:
    assert is_licence(name)


@pytest.mark.parametrize(
    "name", ["licenses/", "noticeboard.txt", "license.py", "license.json", "README.md", "my LICENSE"]
)
def test_other_names(name: str) -> None:
    assert not is_licence(name)
