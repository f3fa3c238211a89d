"""Outputs in which rounding noise hides errors: the report says that nothing is proven about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.numpy

from gptconvert.errors import InputError
from gptconvert.model.options import Options
from gptconvert.pipeline import convert
from gptconvert.verify.metrics import MOST_NOISE
from tests.helpers import tiny_gpt2
from tests.verify.exports import export, report_on, tiny


def overflowing(directory: Path) -> Path:
    """A source whose bias of 1e20 drowns everything that is added to it."""
    raw, arrays = tiny_gpt2()
    arrays["transformer.h.0.mlp.c_proj.bias"][3] = 1e20
    source = directory / "source"
    source.mkdir()
    safetensors.numpy.save_file(arrays, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(raw))
    return source


def test_huge_bias_is_noted(tmp_path: Path) -> None:
    result = convert(str(overflowing(tmp_path)), str(tmp_path / "out"))
    (note,) = (note for note in result.notes if "nothing is proven" in note)
    assert note.startswith("onnx/model.onnx: nothing is proven about logits")
    assert result.report is not None and result.report.passed


def test_strict_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = overflowing(tmp_path)
    monkeypatch.setattr("gptconvert.pipeline.tokenizer_files", lambda checkpoint: ({}, ()))  # no other notes
    with pytest.raises(InputError, match="nothing is proven about logits"):
        convert(str(source), str(tmp_path / "out"), Options(strict=True))
    assert not (tmp_path / "out").exists()


def test_ordinary_models_are_far_below(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    report = report_on(checkpoint, export(tmp_path, checkpoint))
    assert report.notes == ()
    shares = [m.noise_share for r in report.artifacts[0].runs for g in r.groups for m in g.measures.values()]
    assert 0 < max(shares) < MOST_NOISE / 1000
