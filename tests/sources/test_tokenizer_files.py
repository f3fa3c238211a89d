"""Tokenizer files next to a checkpoint: which are found, and that none of them can block a reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptconvert.errors import InputError, UnsafeInputError
from gptconvert.sources.tokenizer_files import GPT1, GPT2, HUGGING_FACE, find_tokenizer, first_file

pytestmark = pytest.mark.usefixtures("no_hang")


@pytest.mark.parametrize("names", [GPT1, GPT2, HUGGING_FACE], ids=["gpt1", "gpt2", "hf"])
def test_existing_files_are_found(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert find_tokenizer([str(tmp_path)], names) == {}
    (tmp_path / "vocabulary.txt").touch()
    (tmp_path / names[-1]).touch()
    assert find_tokenizer([str(tmp_path)], names) == {names[-1]: str(tmp_path / names[-1])}
    for name in names:
        (tmp_path / name).touch()
    assert list(find_tokenizer([str(tmp_path)], names)) == list(names)


def test_the_first_folder_that_has_a_file_wins(tmp_path: Path) -> None:
    for folder, name in (("step", "vocab.json"), ("run", "vocab.json"), ("run", "merges.txt")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).touch()
    found = find_tokenizer([str(tmp_path / "step"), str(tmp_path / "run"), str(tmp_path / "none")])
    assert found == {
        "vocab.json": str(tmp_path / "step" / "vocab.json"),
        "merges.txt": str(tmp_path / "run" / "merges.txt"),
    }


def test_a_directory_with_that_name_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a" / "merges.txt").mkdir(parents=True)
    (tmp_path / "merges.txt").touch()
    paths = [str(tmp_path / "a" / "merges.txt"), str(tmp_path / "merges.txt")]
    assert first_file(paths) == paths[1]
    assert first_file(paths[:1]) is None


def test_special_files_and_dangling_links_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "vocab.json")
    with pytest.raises(UnsafeInputError, match="not a regular file") as unsafe:
        find_tokenizer([str(tmp_path)])
    assert unsafe.value.path == str(tmp_path / "vocab.json")
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "merges.txt").symlink_to("nothing")
    with pytest.raises(InputError, match="missing") as missing:
        find_tokenizer([str(tmp_path)])
    assert missing.value.path == str(tmp_path / "merges.txt")
