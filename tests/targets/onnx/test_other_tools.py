"""Other programs' quantisers and optimisers turn our float32 graph into one that loads and computes the same.

docs/onnx.md says what each of them does with the two orientations of a weight, and with a tied head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxslim
import pytest

from gptconvert.model.options import Options
from gptconvert.model.tensors import Array
from gptconvert.pipeline import open_checkpoint
from gptconvert.targets.onnx.plan import plan
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import FIXTURES, checkpoint_of, write_planned

#: Stores its weights as [in, out], with a tied head; as [out, in], with a tied head; as [out, in], with a head.
MODELS = ("gpt2", "gpt_neo", "gpt_neox")
#: Its weight matrices.
MATRICES = {"gpt2": 16, "gpt_neo": 12, "gpt_neox": 9}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model → its float32 graph."""
    root, found = tmp_path_factory.mktemp("graphs"), {}
    for name in MODELS:
        if name == "gpt2":
            checkpoint = open_checkpoint(str(FIXTURES / "gpt2-stdlib"))
        else:
            raw, arrays = witness.saved(Case(name, keys={"vocab_size": 997}), root)
            checkpoint = checkpoint_of(raw, arrays)
        files = plan(checkpoint, Options())[0].files
        write_planned(root / name, files)
        found[name] = root / name / files[0].path
    return found


def logits(path: Path) -> Array:
    """[1, S, V] in float64."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    ids = np.arange(3, 35)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[None]}
    for value in session.get_inputs():
        if value.name not in feeds:
            kind = np.float16 if "float16" in value.type else np.float32
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), kind)
    found: Array = session.run(["logits"], feeds)[0].astype(np.float64)
    return found


def error(path: Path, original: Path) -> float:
    """Root mean square of the difference of the logits, relative to the original's deviation from their mean."""
    exact = logits(original)
    return float((logits(path) - exact).std() / exact.std())


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8)


def dynamic_after_shape_inference(source: Path, target: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    between = target.with_suffix(".inferred.onnx")
    quant_pre_process(source, between, skip_optimization=True)
    dynamic(between, target)


def blocks(source: Path, target: Path, *, replace: bool = False) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(onnx.load(source))
    if replace:
        model.replace_gemm_with_matmul()
    quantiser = MatMulNBitsQuantizer(model.model, bits=8, block_size=32, is_symmetric=True)
    quantiser.process()
    onnx.save(quantiser.model.model, target)


def blocks_of_matrix_products(source: Path, target: Path) -> None:
    blocks(source, target, replace=True)


def slim(source: Path, target: Path) -> None:
    onnxslim.slim(str(source), str(target))


def slim_and_dynamic(source: Path, target: Path) -> None:
    between = target.with_suffix(".slim.onnx")
    slim(source, between)
    dynamic(between, target)


def half(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=False), target)


Tool = Callable[[Path, Path], None]
#: Tool → the largest error that its arithmetic explains. int8 has one scale per tensor of activations; 8-bit blocks
#: round weights only; float16 has 11 bits; removing nodes is exact. A wrong matrix gives an error of about 1.
TOOLS: dict[Tool, float] = {
    dynamic: 1e-1,
    dynamic_after_shape_inference: 1e-1,
    blocks: 3e-2,
    blocks_of_matrix_products: 3e-2,
    slim: 1e-6,
    slim_and_dynamic: 1e-1,
    half: 3e-3,
}
#: Tool → the operator of its products, and how many matrices it converts of each model.
CONVERTED: dict[Tool, tuple[str, dict[str, int]]] = {
    dynamic: ("MatMulInteger", MATRICES),
    dynamic_after_shape_inference: ("MatMulInteger", MATRICES),
    blocks: ("MatMulNBits", {"gpt2": 16, "gpt_neo": 0, "gpt_neox": 0}),
    blocks_of_matrix_products: ("MatMulNBits", MATRICES),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_the_result_loads_and_computes_the_same(
    tool: Tool, model: str, graphs: dict[str, Path], tmp_path: Path
) -> None:
    before = graphs[model].with_name("model.onnx_data").read_bytes()
    tool(graphs[model], tmp_path / "model.onnx")
    assert graphs[model].with_name("model.onnx_data").read_bytes() == before
    found = error(tmp_path / "model.onnx", graphs[model])
    assert found < TOOLS[tool]
    if tool in CONVERTED:
        operator, numbers = CONVERTED[tool]
        assert operators(tmp_path / "model.onnx")[operator] == numbers[model]
