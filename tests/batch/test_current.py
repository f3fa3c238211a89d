"""A job is skipped if its output is there and right, and for no other reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gptconvert.batch.alone import run_alone
from gptconvert.batch.jobs import Job, parse_job
from gptconvert.errors import OutputError
from tests.commands import TINY, tree

QUICK: dict[str, Any] = {"verify": None}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY / "hf-safetensors", tmp_path / "model"))


def job(source: Path, output: Path, targets: str = "safetensors", **options: Any) -> Job:
    return parse_job(
        {"source": str(source), "output": str(output), "targets": targets, "options": {**QUICK, **options}}
    )


@pytest.fixture
def output(source: Path, tmp_path: Path) -> Path:
    assert run_alone(job(source, tmp_path / "out")).status == "converted"
    return tmp_path / "out"


def test_an_equal_job_is_skipped(source: Path, output: Path, tmp_path: Path) -> None:
    before, moved = tree(output), Path(shutil.copytree(source, tmp_path / "other" / "model"))
    for where in (source, moved):
        record = run_alone(job(where, output))
        assert (record.status, record.exit_code) == ("skipped", 0)
        assert (record.details["family"], record.details["verified"]) == ("gpt2", False)
    assert run_alone(job(source, output, force=True)).status == "skipped"
    assert tree(output) == before


def test_options_of_the_run_do_not_matter(source: Path, output: Path) -> None:
    assert run_alone(job(source, output, seed=7, cache_dir="cache")).status == "skipped"


@pytest.mark.parametrize(
    ("targets", "options", "reason"),
    [
        ("safetensors", {"dtype": "fp16"}, "its options differ: dtype"),
        ("safetensors", {"verify": "default"}, "its options differ: verify"),
        ("safetensors,onnx", {}, "its targets are safetensors, not onnx, safetensors"),
    ],
)
def test_other_parameters(source: Path, output: Path, targets: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OutputError, match="not up to date") as caught:
        run_alone(job(source, output, targets, **options))
    assert reason in caught.value.message
    assert "force" in (caught.value.hint or "")


def edit_manifest(**fields: Any) -> Callable[[Path, Path], None]:
    def edit(_: Path, output: Path) -> None:
        path = output / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def flip(name: str, at: int = -1) -> Callable[[Path, Path], None]:
    def edit(source: Path, output: Path) -> None:
        path = (source.parent if name.startswith("model/") else output) / name
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return edit


def remove(name: str) -> Callable[[Path, Path], None]:
    return lambda _, output: (output / name).unlink()


def add_line(_: Path, output: Path) -> None:
    with (output / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  ../model/config.json\n")


def source_file(source: Path, _: Path) -> None:
    (source / "LICENSE").write_text("new")


DAMAGE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "weights": (flip("model.safetensors"), "model.safetensors was changed"),
    "missing": (remove("model.safetensors"), "model.safetensors is missing"),
    "no manifest": (remove("manifest.json"), "no manifest.json"),
    "manifest that is not JSON": (flip("manifest.json", 0), "no manifest.json that can be read"),
    "no sums": (remove("SHA256SUMS"), "SHA256SUMS is missing"),
    "sums of another file": (add_line, "lists other files"),
    "manifest": (edit_manifest(config={}), "manifest.json was changed"),
    "version": (edit_manifest(tool={"name": "gptconvert", "version": "0.0.1"}), "its tool differ: version"),
    "schema": (edit_manifest(schema_version=0), "its schema_version is 0"),
    "library": (edit_manifest(libraries={"numpy": "1"}), "its libraries differ: huggingface_hub, numpy"),
    "source's weights": (flip("model/model.safetensors"), "the source has changed: files"),
    "file of the source": (source_file, "LICENSE of the source has changed, or is new"),
    "no source": (edit_manifest(source=None), "records no source"),
    "no digests": (edit_manifest(source={"files": [3]}), "records no digests"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_not_right_is_replaced_only_by_force(source: Path, output: Path, name: str) -> None:
    damage, reason = DAMAGE[name]
    damage(source, output)
    before = tree(output)
    with pytest.raises(OutputError, match="output exists and is not up to date") as caught:
        run_alone(job(source, output))
    assert reason in caught.value.message
    assert tree(output) == before
    assert run_alone(job(source, output, force=True)).status == "converted"
    assert run_alone(job(source, output)).status == "skipped"


def test_an_edited_model_card_stays(source: Path, output: Path) -> None:
    (output / "README.md").write_text("edited")
    assert run_alone(job(source, output)).status == "skipped"
    assert (output / "README.md").read_text() == "edited"


def test_an_empty_directory_and_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run_alone(job(source, tmp_path / "empty")).status == "converted"
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a directory"):
        run_alone(job(source, tmp_path / "file"))


def test_a_quality_limit_that_is_stricter(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits are no option that the manifest records, but its verification has them."""
    output = tmp_path / "out"
    options: dict[str, Any] = {"quantize": ["q8"], "no_base": True}
    run_alone(job(source, output, "onnx", **options))
    manifest = json.loads((output / "manifest.json").read_text())
    verification = {"artifacts": [{"quality": {"ok": True, "max_kl": 0.2}}]}
    from gptconvert.batch.current import _limit_difference

    for limit, reason in (
        (0.3, None),
        (0.2, None),
        (0.1, "it was verified with --max-kl 0.2, not 0.1"),
        (None, None),
    ):
        assert _limit_difference(limit, {**manifest, "verification": verification}) == reason
    assert _limit_difference(0.1, manifest) is None


def test_a_job_that_merges_an_adapter(source: Path, tmp_path: Path) -> None:
    """``base`` with the adapter as source is recorded as ``adapter``; both are digested."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    width = json.loads((source / "config.json").read_text())["n_embd"]
    settings = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["h.0.attn.c_attn"],
        "fan_in_fan_out": True,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    stem = "base_model.model.transformer.h.0.attn.c_attn"
    low = np.ones((1, width), np.float32)
    arrays = {f"{stem}.lora_A.weight": low, f"{stem}.lora_B.weight": np.ones((3 * width, 1), np.float32)}
    save_file(arrays, adapter / "adapter_model.safetensors")
    given = job(adapter, tmp_path / "out", base=str(source))
    assert [run_alone(given).status for _ in range(2)] == ["converted", "skipped"]
    arrays[f"{stem}.lora_A.weight"] = 2 * low
    save_file(arrays, adapter / "adapter_model.safetensors")
    with pytest.raises(OutputError, match="not up to date"):
        run_alone(given)
