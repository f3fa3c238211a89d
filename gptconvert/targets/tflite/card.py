"""The model card's part on LiteRT files: how Python and Android load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptconvert.targets.target import CardFacts, Snippet
from gptconvert.targets.tflite.plan import NAME

#: Type → what it is for.
USES: Mapping[str, str] = {
    "f32": "weights as in the checkpoint",
    "f16": "float16 matrices; half the size, and computes in float32",
    "int8": "8-bit matrices with a scale per row; a quarter of the size",
}
PYTHON = """
import numpy as np
from ai_edge_litert.interpreter import Interpreter

run = Interpreter(model_path="{file}").get_signature_runner("serving_default")
ids = np.array([[0, 1]], np.int64)
print(run(input_ids=ids, attention_mask=np.ones_like(ids)))
"""


def _python(facts: CardFacts) -> str | None:
    export = facts.of(NAME)
    if export is None or facts.checkpoint.config.task == "multiple-choice":
        return None
    return PYTHON.format(file=export.path)


def _remark(facts: CardFacts) -> str | None:
    return "the signature `decode` takes and returns keys and values" if facts.generates else None


SNIPPETS = (Snippet("LiteRT (ai-edge-litert)", "python", _python, _remark),)


def graphs(facts: CardFacts, verification: Mapping[str, Any]) -> Sequence[tuple[str, int, str, str]]:
    """(path, bytes, use, proof) of each file; none if there is one in float32."""
    exports = facts.all_of(NAME)
    if [export.variant for export in exports] in ([], ["f32"]):
        return ()
    reports = {report["path"]: report for report in verification.get("artifacts", ())}
    return [(e.path, facts.files[e.path], USES[e.variant], _proof(reports.get(e.path))) for e in exports]


def _proof(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "not verified"
    limit = report.get("quality", {}).get("max_kl")
    return "weights, outputs" + ("" if limit is None else f", mean KL divergence at most {limit:g}")
