"""``import gptconvert`` is fast and has the names that the README uses."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gptconvert
import gptconvert.pipeline
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


def test_plan_opens_a_path() -> None:
    assert gptconvert.plan(TINY / "openai-tf", gptconvert.Options(targets=("safetensors",))).nbytes


@pytest.mark.parametrize("options", [{"verify": None}, "onnx", {}, ["onnx"]])
def test_options_of_another_type_are_refused(tmp_path: Path, options: Any) -> None:
    source, output = TINY / "openai-tf", tmp_path / "out"
    checkpoint = gptconvert.open_checkpoint(source)
    calls: list[Callable[[], object]] = [
        lambda: gptconvert.open_checkpoint(source, options),
        lambda: gptconvert.inspect(source, options),
        lambda: gptconvert.plan(checkpoint, options),
        lambda: gptconvert.convert(source, output, options),
        lambda: gptconvert.convert(checkpoint, output, options),
        lambda: gptconvert.verify_export(source, tmp_path, options),
    ]
    for call in calls:
        with pytest.raises(gptconvert.errors.UsageError, match=r"gptconvert\.Options"):
            call()


def test_paths_may_be_bytes(tmp_path: Path) -> None:
    options: Any = gptconvert.Options(verify=None)
    result = gptconvert.convert(bytes(TINY / "openai-tf"), bytes(tmp_path / "out"), options)  # type: ignore[arg-type]
    assert result.output == str(tmp_path / "out")


def test_options_are_values() -> None:
    options = gptconvert.Options(targets=("onnx", "tf"), set_key=("a=1",))
    assert pickle.loads(pickle.dumps(options)) == options == copy.deepcopy(options)
    assert len({options, gptconvert.Options(), dataclasses.replace(options)}) == 2
    with pytest.raises(gptconvert.errors.UsageError):
        dataclasses.replace(options, dtype="int8")


def test_in_threads_and_in_an_event_loop(tmp_path: Path) -> None:
    """As in notebooks and servers: signal handlers exist in the main thread only."""

    async def several() -> list[gptconvert.pipeline.Result]:
        convert, options = gptconvert.convert, gptconvert.Options(verify=None)
        here = convert(TINY / "openai-tf", tmp_path / "here", options)
        names = ("a", "b", "c")
        jobs = [asyncio.to_thread(convert, TINY / "openai-tf", tmp_path / name, options) for name in names]
        return [here, *await asyncio.gather(*jobs)]

    results = asyncio.run(several())
    assert len({file.sha256 for result in results for file in result.files if file.path == "manifest.json"}) == 1
