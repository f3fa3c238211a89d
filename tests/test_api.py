"""``import gptconvert`` is fast and has the names that the README uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gptconvert
from tests.commands import TINY


def test_import_does_not_import_heavy_libraries() -> None:
    code = "import sys, gptconvert; sys.exit(len({'numpy', 'torch', 'click', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_is_importable_and_stable(tmp_path: Path) -> None:
    for name in gptconvert.__all__:
        assert getattr(gptconvert, name) is not None
    checkpoint = gptconvert.open_checkpoint(str(TINY / "openai-tf"))
    result = gptconvert.convert(checkpoint, str(tmp_path / "out"), gptconvert.Options(targets=("onnx",)))
    assert result.report is not None
    assert gptconvert.verify_export(str(TINY / "openai-tf"), str(tmp_path / "out")).passed
    assert callable(gptconvert.convert)
    assert callable(gptconvert.verify_export)
    assert gptconvert.inspect(str(TINY / "openai-tf"))["family"] == "gpt2"


def test_errors_carry_their_exit_codes() -> None:
    errors = gptconvert.errors
    codes = {e.exit_code for e in errors.GptConvertError.__subclasses__()}
    assert codes == {2, 3, 4, 5, 6, 7}


def test_values_have_short_representations(tmp_path: Path) -> None:
    checkpoint = gptconvert.open_checkpoint(TINY / "openai-tf")
    planned = gptconvert.plan(checkpoint)
    result = gptconvert.convert(checkpoint, tmp_path / "out", gptconvert.Options(verify=None))
    for value in (checkpoint, checkpoint.source, planned, result):
        assert len(repr(value)) < 200 + len(str(tmp_path)) + len(str(TINY)), type(value)


def test_convert_opens_a_path(tmp_path: Path) -> None:
    for number, source in enumerate((TINY / "openai-tf", str(TINY / "openai-tf"))):
        result = gptconvert.convert(source, tmp_path / str(number), gptconvert.Options(verify=None))
        assert result.checkpoint.config.family == "gpt2"


def test_dir_lists_the_public_names() -> None:
    assert {*gptconvert.__all__, "__version__"} <= set(dir(gptconvert))
