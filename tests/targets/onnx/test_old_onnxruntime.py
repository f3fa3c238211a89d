"""The oldest onnxruntime that docs/onnx.md promises for each opset runs the graph and computes the same.

Each version runs in an environment of its own: GPTCONVERT_OLD_ONNXRUNTIME lists their interpreters, separated by
colons. ``make test-old-onnxruntime`` creates them.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.model.options import OPSETS, Options
from gptconvert.targets.onnx.plan import IR_VERSIONS, plan
from tests.families import witness
from tests.families.witness import Case, inputs_of
from tests.helpers import ROOT, write_planned

INTERPRETERS = [path for path in os.environ.get("GPTCONVERT_OLD_ONNXRUNTIME", "").split(":") if path]
CASES = [Case("gpt2"), Case("gptj"), Case("gpt_neox"), Case("gpt1", "multiple-choice")]

#: Runs in the old environment: {case}-{opset}.npz → its outputs, or the reason why the graph is refused.
PROGRAM = """
import sys, json, pathlib, numpy, onnxruntime
onnxruntime.set_default_logger_severity(4)
for graph in sorted(pathlib.Path(sys.argv[1]).glob("*/*/onnx/model.onnx")):
    directory = graph.parent.parent
    try:
        session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        feeds = dict(numpy.load(directory / "feeds.npz"))
        names = [output.name for output in session.get_outputs()]
        numpy.savez(directory / "found.npz", **dict(zip(names, session.run(None, feeds))))
    except Exception as error:
        (directory / "refused.txt").write_text(str(error))
print(onnxruntime.__version__)
"""


def promised() -> dict[int, tuple[int, tuple[int, int]]]:
    """Opset → (IR version, oldest onnxruntime) as documented."""
    page = (ROOT / "docs/onnx.md").read_text()
    rows = re.findall(r"^  \| ([\d, ]+) \| (\d+) \| (\d+)\.(\d+) \|$", page, re.MULTILINE)
    return {int(opset): (int(ir), (int(a), int(b))) for opsets, ir, a, b in rows for opset in opsets.split(", ")}


def test_documented_opsets_and_ir_versions() -> None:
    assert {opset: ir for opset, (ir, _) in promised().items()} == IR_VERSIONS
    assert tuple(promised()) == tuple(OPSETS)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case at every opset, with inputs and what the current onnxruntime computes."""
    import onnxruntime

    root = tmp_path_factory.mktemp("exports")
    for case in CASES:
        checkpoint = witness.checkpoint(case, root / "saved", Options(task=case.task))
        for opset in OPSETS:
            directory = root / str(opset) / str(case)
            files = plan(checkpoint, Options(opset=opset))[0].files
            write_planned(directory, files)
            session = onnxruntime.InferenceSession(directory / files[0].path, providers=["CPUExecutionProvider"])
            feeds = feeds_of(session, inputs_of(case.task))
            names = [output.name for output in session.get_outputs()]
            np.savez(directory / "feeds.npz", **feeds)
            np.savez(directory / "expected.npz", **dict(zip(names, session.run(None, feeds), strict=True)))
    return root


def feeds_of(session: Any, inputs: Any) -> dict[str, Any]:
    """The graph's inputs, with an empty past."""
    return {
        value.name: np.ascontiguousarray(inputs[value.name])
        if value.name in inputs
        else np.zeros((len(inputs["input_ids"]), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
    }


@pytest.mark.skipif(not INTERPRETERS, reason="no old onnxruntime: make test-old-onnxruntime")
@pytest.mark.parametrize("interpreter", INTERPRETERS or [""])
def test_graphs_run(interpreter: str, exports: Path) -> None:
    """Graphs of the opsets promised for this version run; those of later ones are refused."""
    for left in exports.glob("*/*/*.txt"):
        left.unlink()
    done = subprocess.run([interpreter, "-c", PROGRAM, exports], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    version = tuple(int(number) for number in done.stdout.strip().split(".")[:2])
    ran = {d.parent.name for d in exports.glob("*/*") if (d / "found.npz").exists()}
    assert ran == {str(opset) for opset, (_, oldest) in promised().items() if oldest <= version}
    for found in exports.glob("*/*/found.npz"):
        expected = np.load(found.with_name("expected.npz"))
        for name, actual in np.load(found).items():
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(actual, expected[name], rtol=0, atol=1e-5 * scale, err_msg=str(found))
        found.unlink()
