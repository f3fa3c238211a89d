"""`verify` of a directory compares the files beside the artifacts, by checksum and with the checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import Options
from gptconvert.pipeline import convert, open_checkpoint, verify_export
from gptconvert.targets.package.sidecars import with_special_ids
from gptconvert.targets.package.verify import CHECKS, verify_package
from tests.commands import TRAINED, command


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published") / "out"
    convert(TRAINED, out, Options(targets=("onnx", "safetensors"), verify=None))
    return out


@pytest.fixture
def export(published: Path, tmp_path: Path) -> Path:
    """A copy without checksums, as other programs write."""
    shutil.copytree(published, tmp_path / "out")
    (tmp_path / "out" / "SHA256SUMS").unlink()
    return tmp_path / "out"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return with_special_ids(open_checkpoint(TRAINED))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_published_directory_agrees(published: Path, checkpoint: Checkpoint) -> None:
    report = verify_package(checkpoint, str(published))
    assert (report.problems, report.notes) == ([], [])
    assert report.files == [
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "genai_config.json",
    ]


#: File, change of its content, and the problem reported.
ALTERED: list[tuple[str, Callable[[Any], object], str]] = [
    ("config.json", lambda c: c.update(n_head=4), "config.json: n_head is 4, the checkpoint has 3"),
    (
        "config.json",
        lambda c: c.update(layer_norm_epsilon=1e-6),
        "layer_norm_epsilon is 1e-06, the checkpoint has 1e-05",
    ),
    ("config.json", lambda c: c.update(activation_function="gelu"), "activation_function is 'gelu_erf'"),
    ("config.json", lambda c: c.update(scale_attn_weights=False), "scale_attn_weights is False"),
    ("config.json", lambda c: c.update(model_type="gptj"), "model_type is 'gptj', the checkpoint has 'gpt2'"),
    ("config.json", lambda c: c.pop("n_embd"), "n_embd is 768, the checkpoint has 144"),
    ("config.json", lambda c: c.update(n_layer="four"), "config.json: "),
    ("config.json", lambda c: c.update(n_positions=c["n_ctx"] - 1), "n_positions is "),
    ("generation_config.json", lambda c: c.update(eos_token_id=5), "eos_token_id is 5, the checkpoint has 2002"),
    ("generation_config.json", lambda c: c.pop("eos_token_id"), "eos_token_id is absent, the checkpoint has 2002"),
    ("tokenizer.json", lambda c: c["model"]["merges"].pop(3), "gives other ids than the checkpoint's tokenizer"),
    ("tokenizer.json", lambda c: c.update(pre_tokenizer=None), "gives other ids than the checkpoint's tokenizer"),
    ("tokenizer.json", lambda c: c.update(decoder=None), "to other text than the checkpoint's tokenizer"),
    ("tokenizer.json", lambda c: c.pop("model"), "cannot be read by the tokenizers library"),
    ("vocab.json", lambda c: c.update({"a": c["b"], "b": c["a"]}), "vocab.json: 2 tokens differ"),
    (
        "genai_config.json",
        lambda c: c["model"].update(eos_token_id=1),
        "model.eos_token_id is 1",
    ),
    ("genai_config.json", lambda c: c["model"]["decoder"].update(head_size=9), "model.decoder.head_size is 9"),
    (
        "genai_config.json",
        lambda c: c["model"]["decoder"]["inputs"].update(past_key_names="past.%d.k"),
        "model.decoder.inputs.past_key_names is 'past.%d.k'",
    ),
    (
        "genai_config.json",
        lambda c: c["search"].update(past_present_share_buffer=True),
        "past_present_share_buffer is True",
    ),
    ("genai_config.json", lambda c: c.pop("model"), "genai_config.json: has no decoder"),
]


@pytest.mark.parametrize(("name", "change", "problem"), ALTERED)
def test_altered_file_is_named(
    export: Path, checkpoint: Checkpoint, name: str, change: Callable[[Any], object], problem: str
) -> None:
    edit(export / name, change)
    problems = verify_package(checkpoint, str(export)).problems
    assert problems
    assert all(found.startswith(f"{name}: ") for found in problems)
    assert any(problem in found for found in problems), problems


def test_altered_merges(export: Path, checkpoint: Checkpoint) -> None:
    lines = (export / "merges.txt").read_text().splitlines()
    (export / "merges.txt").write_text("\n".join([*lines[:5], lines[6], lines[5], *lines[7:]]) + "\n")
    assert verify_package(checkpoint, str(export)).problems == ["merges.txt: other merges than the checkpoint's"]


def test_changed_and_missing_files_contradict_the_checksums(
    published: Path, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    out = tmp_path / "out"
    shutil.copytree(published, out)
    (out / "vocab.json").unlink()
    (out / "manifest.json").write_bytes((out / "manifest.json").read_bytes() + b" ")
    (out / "README.md").write_text("edited")
    report = verify_package(checkpoint, str(out))
    assert report.problems == [
        "SHA256SUMS: manifest.json was changed after it was published",
        "SHA256SUMS: lists vocab.json, which is missing",
    ]
    assert report.notes == ["README.md was edited after SHA256SUMS was written"]


def test_checksums_do_not_lead_out_of_the_directory(export: Path, checkpoint: Checkpoint) -> None:
    secret = hashlib.sha256(b"").hexdigest()
    (export / "SHA256SUMS").write_text(f"{secret}  ../secret\n{secret}  /etc/passwd\nnonsense\n")
    problems = verify_package(checkpoint, str(export)).problems
    assert len(problems) == 3
    assert all(problem.startswith("SHA256SUMS: cannot be read: ") for problem in problems)


def test_checksums_of_enormous_files_are_not_computed(export: Path, checkpoint: Checkpoint) -> None:
    """Neither of one, nor of many links to one."""
    with open(export / "huge", "wb") as file:
        file.truncate(1 << 40)
    (export / "SHA256SUMS").write_text(f"{'0' * 64}  huge\n")
    problem = "SHA256SUMS: lists files that are too large for an export of this model, huge among them"
    assert verify_package(checkpoint, str(export)).problems == [problem]


def test_an_unforeseen_failure_is_a_difference(
    export: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise OverflowError("cannot fit")
        yield

    monkeypatch.setitem(CHECKS, "config.json", fail)  # type: ignore[arg-type]
    (problem,) = verify_package(checkpoint, str(export)).problems
    assert problem.startswith("config.json: cannot be read as part of an export (OverflowError: cannot fit)")


def test_a_directory_of_artifacts_alone_passes(export: Path, checkpoint: Checkpoint) -> None:
    for path in export.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            path.unlink()
    report = verify_package(checkpoint, str(export))
    assert (report.files, report.problems) == ([], [])


def test_verify_fails_and_says_where(capsys: Any, export: Path) -> None:
    edit(export / "tokenizer.json", lambda c: c["model"]["merges"].pop(3))
    (export / "model.safetensors").unlink()
    done = command(capsys, "verify", TRAINED, export)
    assert done.code == 5
    assert "checksums, configuration and tokenizer: 1 of 6 files disagrees  FAIL" in done.out
    assert "15 of 15 probe groups" not in done.out  # a failure shows every group
    found = command(capsys, "verify", TRAINED, export, "--json").json
    assert found["verification"]["package"]["ok"] is False
    assert all(artifact["ok"] for artifact in found["verification"]["artifacts"])


def test_verify_passes_and_says_so(capsys: Any, published: Path) -> None:
    done = command(capsys, "verify", TRAINED, published)
    assert done.code == 0
    assert done.out.startswith("checksums, configuration and tokenizer: 7 files agree\n")


def test_other_programs_files_agree(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 97, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 56}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=95, eos_token_id=96))
    model.save_pretrained(tmp_path / "source")
    model.save_pretrained(tmp_path / "export")
    report = verify_export(tmp_path / "source", tmp_path / "export")
    assert report.passed
    assert report.package is not None
    assert report.package.files == ["config.json", "generation_config.json"]


def test_keys_that_transformers_does_not_read_are_not_compared(export: Path, checkpoint: Checkpoint) -> None:
    """The source may have had them too: GPT-2's n_ctx may differ from n_positions, which decides."""
    edit(export / "config.json", lambda c: c.update(n_ctx=c["n_positions"] + 1))
    assert verify_package(checkpoint, str(export)).problems == []


def test_a_graph_with_its_cache_in_place_agrees(tmp_path: Path) -> None:
    convert(TRAINED, tmp_path / "out", Options(targets=("onnx",), in_place=True, verify=None))
    checkpoint = with_special_ids(open_checkpoint(TRAINED))
    assert verify_package(checkpoint, str(tmp_path / "out")).problems == []
    edit(tmp_path / "out" / "genai_config.json", lambda c: c["search"].update(past_present_share_buffer=False))
    (problem, *_) = verify_package(checkpoint, str(tmp_path / "out")).problems[-1:]
    assert problem == "genai_config.json: search.past_present_share_buffer is False, expected True"
