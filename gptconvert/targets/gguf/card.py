"""The model card's part on GGUF files: how llama.cpp, Ollama and LM Studio load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptconvert.model.export import Export
from gptconvert.targets.gguf.layout import ARCHITECTURES, PHI2
from gptconvert.targets.gguf.plan import NAME
from gptconvert.targets.target import CardFacts, Snippet

#: Type → what it is for.
USES: Mapping[str, str] = {
    "f32": "weights as in the checkpoint",
    "f16": "float16 weights; every device",
    "bf16": "bfloat16 weights; recent processors and GPUs",
    "q8_0": "8-bit weights; half the size of F16, hardly a loss",
    "q5_0": "5-bit weights, embedding and head 8-bit",
    "q4_0": "4-bit weights, embedding and head 8-bit; the smallest file and the fastest decoding",
}
PROMPT = "Hello there"

LLAMA = """
llama-completion -m {file} -p "{prompt}" -n 50 --temp 0
"""
SERVER = """
llama-server -m {file}
curl http://127.0.0.1:8080/completion -d '{{"prompt": "{prompt}", "n_predict": 50}}'
"""
OLLAMA = """
cat > Modelfile <<'END'
FROM ./{file}
TEMPLATE "{{{{ .Prompt }}}}"
END
ollama create {name} -f Modelfile
ollama run {name} "{prompt}"
"""
STUDIO = """
lms import {file}
"""
PYTHON = """
import xllamacpp

given = xllamacpp.CommonParams()
given.model.path = "{file}"
server = xllamacpp.Server(given)
print(server.handle_completions({{"prompt": {prompt}, "n_predict": 20}})["choices"][0]["text"])
"""


def smallest(facts: CardFacts) -> Export | None:
    """The export that the snippets load: float16 if there is one."""
    found = {export.variant: export for export in facts.all_of(NAME)}
    return found.get("f16") or facts.of(NAME)


def _filled(template: str, facts: CardFacts, *, tokenized: bool = True) -> str | None:
    export = smallest(facts)
    if export is None or (tokenized and not facts.tokenized):
        return None
    name = export.path.partition("-")[0].lower()
    return template.format(file=export.path, name=name, prompt=PROMPT)


def _python(facts: CardFacts) -> str | None:
    export = smallest(facts)
    prompt = f'"{PROMPT}"' if facts.tokenized else "[0, 1]"
    return None if export is None else PYTHON.format(file=export.path, prompt=prompt)


def _remark(facts: CardFacts) -> str | None:
    if ARCHITECTURES[facts.checkpoint.config.family] is PHI2:
        return "it shows the model as phi2, whose graph computes it: the rows of q and k are reordered for that"
    return None


SNIPPETS = (
    Snippet("llama.cpp", "sh", lambda facts: _filled(LLAMA, facts), _remark),
    Snippet("llama.cpp's server", "sh", lambda facts: _filled(SERVER, facts)),
    Snippet("Ollama", "sh", lambda facts: _filled(OLLAMA, facts), lambda _: "a base model continues text as it is"),
    Snippet("LM Studio", "sh", lambda facts: _filled(STUDIO, facts)),
    Snippet("xllamacpp", "python", _python),
)


def graphs(facts: CardFacts, verification: Mapping[str, Any]) -> Sequence[tuple[str, int, str, str]]:
    """(path, bytes, use, proof) of each file; none if there is one with plain weights."""
    exports = facts.all_of(NAME)
    if len(exports) < 2 and all(export.variant in ("f32", "f16", "bf16") for export in exports):
        return ()
    reports = {report["path"]: report for report in verification.get("artifacts", ())}
    return [
        (e.path, sum(file.nbytes for file in e.files), USES[e.variant], _proof(reports.get(e.path))) for e in exports
    ]


def _proof(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "not verified"
    parts = ["weights", *(["outputs"] if report.get("runs") else [])]
    limit = report.get("quality", {}).get("max_kl")
    return ", ".join(parts) + ("" if limit is None else f", mean KL divergence at most {limit:g}")
