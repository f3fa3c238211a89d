"""Complete output directories of tiny models: every family and task, with a tokenizer and the card."""

from __future__ import annotations

import json
import re
from pathlib import Path

from gptconvert.model.options import Options
from gptconvert.targets.onnx.plan import plan as plan_onnx
from gptconvert.targets.package.model_card import model_card
from gptconvert.targets.package.sidecars import sidecar_files
from gptconvert.targets.safetensors.plan import plan as plan_safetensors
from gptconvert.targets.target import CardFacts
from tests.families import witness
from tests.helpers import checkpoint_of, write_planned
from tests.targets.package import test_tokenizer_kinds as kinds
from tests.targets.package import word_end


def tokenizer_files(family: str, directory: Path) -> tuple[dict[str, str], int]:
    """A small tokenizer of the family's kind: file name → path, and its number of ids."""
    directory.mkdir(parents=True, exist_ok=True)
    if family == "gpt1":
        return word_end.write_pair(directory, word_end.HUGGING_FACE), word_end.SIZE
    if family == "gpt_neox":
        kinds.neox().save(str(directory / "tokenizer.json"))
        return {"tokenizer.json": str(directory / "tokenizer.json")}, kinds.SIZE
    model = json.loads(kinds.neox().to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    return {name: str(directory / name) for name in ("vocab.json", "merges.txt")}, len(model["vocab"])


def export(
    case: witness.Case, directory: Path, options: Options, tokenizer: tuple[dict[str, str], int] | None = None
) -> Path:
    """Write ONNX and safetensors of a case, without verification; returns the directory.

    Args:
        case: the model.
        directory: for the output and the source.
        options: of the conversion.
        tokenizer: as :func:`tokenizer_files` returns; None for the family's.
    """
    files_of, size = tokenizer or tokenizer_files(case.family, directory / "tokenizers" / case.family)
    raw, arrays = witness.saved(witness.Case(case.family, case.task, {"vocab_size": size}), directory)
    checkpoint = checkpoint_of(raw, arrays, request=options, tokenizer=files_of)
    exports = (*plan_onnx(checkpoint, options), *plan_safetensors(checkpoint, options))
    files = [*(file for each in exports for file in each.files), *sidecar_files(exports, options)]
    out = directory / f"{case}-{options.dtype}-{options.kv_cache}-{options.position_ids}"
    write_planned(out, files)
    facts = CardFacts(exports[0].checkpoint, exports, options, {file.path: file.nbytes for file in files})
    (out / "README.md").write_bytes(model_card(facts, {}))
    return out


def snippets(directory: Path, language: str) -> dict[str, str]:
    """Library → its code, from the card of a directory."""
    text = (directory / "README.md").read_text("utf-8")
    found = re.findall(rf"\n([^\n]+):\n\n```{language}\n(.*?)```", text, re.DOTALL)
    return {re.split(r"[ ,]", title)[0]: code for title, code in found}
