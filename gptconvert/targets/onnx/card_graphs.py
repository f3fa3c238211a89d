"""The model card's table of graphs: what each is for, and how it was verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptconvert.model.export import Export
from gptconvert.targets.onnx.plan import NAME
from gptconvert.targets.onnx.variants import HALF, KINDS
from gptconvert.targets.target import CardFacts

#: Variant → its weights, and what it is for.
USES: Mapping[str, str] = {
    "": "weights as in the checkpoint; every runtime",
    "bf16": "bfloat16 weights, computes in float32; not for browsers",
    "fp16": "float16 weights, computes in float32; every runtime",
    "quantized": "8-bit weights; browsers, phones, small servers",
    "q4": "4-bit weights; the smallest file and the fastest decoding",
}
HALF_USE = "computes in float16; GPUs and WebGPU with `shader-f16`"
#: Suffix of a graph that shares another's weights → what it is for.
KIND_USES: Mapping[str, str] = {
    "last_token": "the same weights, logits of each row's last token only; long prompts",
    "in_place": "the same weights, keys and values in the caller's buffers; long contexts, onnxruntime only",
}


def kind_of(export: Export) -> str:
    """Suffix of a graph that shares another's weights; empty for other graphs."""
    return next((kind for kind in KINDS if export.variant.endswith(kind)), "")


def graphs(facts: CardFacts, verification: Mapping[str, Any]) -> Sequence[tuple[str, int, str, str]]:
    """(path, bytes with weights, use, proof) of each graph; none if the only graph is the base in some type."""
    exports = facts.all_of(NAME)
    if len(exports) < 2 and not facts.options.quantize:
        return ()
    reports = {report["path"]: report for report in verification.get("artifacts", ())}
    return [(e.path, _nbytes(e), _use(e, facts), _proof(reports.get(e.path), _limit(e, reports))) for e in exports]


def computes_in_half(export: Export, facts: CardFacts) -> bool:
    """Whether the graph computes in float16, and takes and returns it."""
    return HALF in facts.options.quantize and export.variant.removesuffix("_last_token") == HALF


def _nbytes(export: Export) -> int:
    return sum(file.nbytes for file in (*export.files, *export.shared))


def _use(export: Export, facts: CardFacts) -> str:
    if kind := kind_of(export):
        return KIND_USES[kind]
    return HALF_USE if computes_in_half(export, facts) else USES[export.variant]


def _limit(export: Export, reports: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The limit of the mean KL divergence that the graph passed, or the one whose weights it shares."""
    measured = export.path.replace(f"_{kind_of(export)}.onnx", ".onnx")
    limit: float | None = reports.get(measured, {}).get("quality", {}).get("max_kl")
    return limit


def _proof(report: Mapping[str, Any] | None, limit: float | None) -> str:
    """The rules that a graph passed. The limit is stated, not the figure, which differs between machines."""
    if report is None:
        return "not verified"
    return "weights, outputs" + ("" if limit is None else f", mean KL divergence at most {limit:g}")
