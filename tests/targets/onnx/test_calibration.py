"""GPTQ: smaller errors of the outputs on the text than nearest rounding has, and the same codes in every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError, UnsupportedError, UsageError
from gptconvert.model.blocks import BlockFormat, Quantised
from gptconvert.model.options import Options
from gptconvert.targets.onnx.calibration import gptq
from gptconvert.targets.onnx.plan import plan
from gptconvert.targets.verification import verify_exports
from tests.families import witness
from tests.families.witness import BY_TASK, CASES, Case
from tests.helpers import content, write_planned
from tests.verify.exports import report_on, tiny

GENERATING = [case for case in CASES if case.task == "text-generation"]


def layer(rows: int, width: int, out: int = 30, seed: int = 0) -> tuple[Any, Any]:
    """A weight [out, width], and inputs [rows, width] that are correlated."""
    random = np.random.default_rng(seed)
    weight, mixing = random.normal(0, 0.1, (out, width)), random.normal(0, 1, (width, width)) / np.sqrt(width)
    return weight.astype(np.float32), (random.normal(0, 1, (rows, width)) @ mixing).astype(np.float32)


def rounded(weight: Any, inputs: Any, form: BlockFormat) -> tuple[Any, Any]:
    """A weight with nearest and with calibrated codes."""
    import torch

    scales = form.searched_scales(form.in_blocks(weight))
    nearest = form.encode(form.in_blocks(weight), scales)
    correlations = torch.from_numpy(inputs.T @ inputs)
    calibrated = gptq(weight, scales, correlations, form)
    return tuple(
        form.decode(codes, scales).reshape(len(weight), -1)[:, : weight.shape[1]] for codes in (nearest, calibrated)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("width", [33, 64, 150], ids=lambda n: f"width {n}")
@pytest.mark.parametrize("rows", [500, 20], ids=["a long text", "a text shorter than the width"])
def test_errors_of_the_outputs_are_smaller(rows: int, width: int) -> None:
    weight, inputs = layer(rows, width)
    nearest, calibrated = (
        np.square(inputs @ (each - weight).T).sum() for each in rounded(weight, inputs, BlockFormat(4, 16))
    )
    assert calibrated < 0.8 * nearest


def test_equals_the_algorithm_of_the_paper() -> None:
    """One column at a time in float64, with the whole inverse updated after each."""
    form, (weight, inputs) = BlockFormat(4, 16), layer(500, 144)
    scales = np.repeat(form.searched_scales(form.in_blocks(weight)), 16, axis=1).astype(np.float64)
    hessian = inputs.T.astype(np.float64) @ inputs
    inverse, left = np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(144)), weight.astype(np.float64)
    expected = np.empty_like(left)
    for i in range(144):
        expected[:, i] = (np.floor(left[:, i] / scales[:, i] + 8.5).clip(0, 15) - 8) * scales[:, i]
        left -= np.outer((left[:, i] - expected[:, i]) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    found = rounded(weight, inputs, form)[1]
    assert (np.abs(found - expected) < 1e-6).mean() > 0.99  # a tie may round differently


@pytest.mark.parametrize(
    "inputs",
    [np.zeros((10, 48)), np.ones((10, 48)), np.eye(10, 48) * 1e-30, np.eye(10, 48) * 1e15],
    ids=["no input", "one direction", "tiny", "huge"],
)
def test_singular_correlations(inputs: Any) -> None:
    weight, _ = layer(1, 48)
    nearest, calibrated = rounded(weight, inputs.astype(np.float32), BlockFormat(4, 16))
    assert np.isfinite(calibrated).all()
    error = [np.square(inputs @ (each - weight).T).sum() for each in (nearest, calibrated)]
    assert error[1] <= error[0] * 1.0001 + 1e-30


def test_zero_scales_give_zeros() -> None:
    weight, inputs = layer(50, 48)
    weight[:, 16:32] = 0
    assert (rounded(weight, inputs, BlockFormat(4, 16))[1][:, 16:32] == 0).all()


def test_correlations_that_are_not_finite() -> None:
    import torch

    weight, inputs = layer(50, 48)
    with pytest.raises(InputError, match="computes NaN or infinity on the calibration text"):
        gptq(weight, np.ones((30, 3), np.float32), torch.from_numpy(inputs.T @ inputs) * np.nan, BlockFormat(4, 16))


def planned(checkpoint: Any, **options: Any) -> Any:
    settings = {"quantize": ("q4",), "no_base": True, "block_size": 16, "calibrate": "self", **options}
    return plan(checkpoint, Options(**settings))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_every_family(case: Case, directory: Path, tmp_path: Path) -> None:
    checkpoint = witness.checkpoint(case, directory)
    exports = planned(checkpoint, quantize=("q4:plain",))
    write_planned(tmp_path, exports[0].files)
    report = verify_exports(exports, str(tmp_path))
    assert report.passed, report.table()
    again = report_on(checkpoint, tmp_path)
    assert again.passed, again.table()
    assert any("calibrated on a text" in note for note in again.notes)


def test_every_matrix_of_4_bits_is_calibrated_and_no_other(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, n_layer=3)
    (plain,), (calibrated,) = planned(checkpoint, calibrate=None), planned(checkpoint)
    changed = set()
    for name, weight in calibrated.checkpoint.weights.items():
        other = plain.checkpoint.weights[name]
        if isinstance(weight, Quantised):
            assert np.array_equal(weight.scales.read(), other.scales.read())
            if not np.array_equal(weight.codes.read(), other.codes.read()):
                changed.add(name)
    bits = {n: w.format.bits for n, w in plain.checkpoint.weights.items() if isinstance(w, Quantised)}
    assert changed == {name for name, n in bits.items() if n == 4}
    assert 8 in bits.values()


def test_codes_are_the_same_in_every_run_and_with_any_number_of_threads(tmp_path: Path) -> None:
    import torch

    checkpoint, before, found = tiny(tmp_path), torch.get_num_threads(), []
    for threads in (1, 1, 3):
        torch.set_num_threads(threads)
        found.append(content(planned(checkpoint)[0].files[0]))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_a_task_without_samples_takes_a_text_only(directory: Path) -> None:
    checkpoint = witness.checkpoint(next(c for c in BY_TASK if c.task == "text-classification"), directory)
    with pytest.raises(UsageError, match="--calibrate self needs a language model"):
        planned(checkpoint)


@pytest.mark.parametrize("quantize", [("q8",), ("q8", "fp16")], ids=str)
def test_nothing_to_calibrate(quantize: Any, tmp_path: Path) -> None:
    with pytest.raises((UsageError, UnsupportedError), match="--calibrate has no effect"):
        planned(tiny(tmp_path), quantize=quantize)
