"""The model card: README.md of an output directory, with the YAML head that the Hugging Face hub reads.

Nothing in it depends on where or when it was made: no paths of this machine, no dates. No licence either, since a
conversion does not change the one the weights came with, and the checkpoint does not say which it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptconvert.checkpoint import Checkpoint
from gptconvert.errors import printable
from gptconvert.families import family_named
from gptconvert.targets.plan import PlannedFile, TargetOptions
from gptconvert.targets.sidecars import ONNX_GRAPH, onnx_graphs

if TYPE_CHECKING:
    from gptconvert.publish.writer import WrittenFile

#: The hub's name of the library that loads a target, best first.
LIBRARY = {"safetensors": "transformers", "onnx": "onnx"}
TARGET_TITLE = {"onnx": "ONNX", "safetensors": "safetensors", "tf": "TensorFlow SavedModel"}
#: Families that transformers.js knows.
IN_TRANSFORMERS_JS = frozenset({"gpt2", "gpt_neo", "gptj", "gpt_neox"})
#: Graph file → what transformers.js calls its dtype.
JS_DTYPE = {"model.onnx": "fp32", "model_fp16.onnx": "fp16", "model_quantized.onnx": "q8", "model_q4.onnx": "q4"}
DEFAULTS = TargetOptions()


@dataclass(frozen=True)
class _Facts:
    """What the sections are written from. ``files``: path → bytes; ``graph``: the ONNX graph's path, if any."""

    checkpoint: Checkpoint
    targets: tuple[str, ...]
    options: TargetOptions
    verification: Mapping[str, object]
    files: Mapping[str, int]
    graph: str | None

    @property
    def generates(self) -> bool:
        return self.checkpoint.config.task == "text-generation"

    @property
    def tokenized(self) -> bool:
        return not self.files or "tokenizer.json" in self.files

    @property
    def continues_text(self) -> bool:
        """Whether the ONNX graph can continue a text in any runtime: keys and values, and a tokenizer."""
        return self.graph is not None and self.generates and self.tokenized and self.options.kv_cache


def card(
    checkpoint: Checkpoint,
    targets: Collection[str],
    options: TargetOptions,
    verification: Mapping[str, object],
    files: Iterable[PlannedFile | WrittenFile] = (),
) -> bytes:
    """README.md for what was exported.

    Args:
        checkpoint: what was exported.
        targets: names of the targets asked for.
        options: as given to the targets.
        verification: the report of the verification (``verify.Report.as_dict``); empty if there was none, which
            the card then says.
        files: the other files of the directory, with the sizes they have.
    """
    sizes = {file.path: file.nbytes for file in files}
    graph = next(iter(onnx_graphs(sizes)), ONNX_GRAPH) if "onnx" in targets else None
    facts = _Facts(checkpoint, tuple(sorted(targets)), options, verification, dict(sorted(sizes.items())), graph)
    sections = (_front_matter, _introduction, _architecture, _verification, _files, _loading)
    return "\n".join(text for section in sections if (text := section(facts))).encode()


def _front_matter(facts: _Facts) -> str:
    library = next((name for target, name in LIBRARY.items() if target in facts.targets), None)
    family = family_named(facts.checkpoint.config.family)
    head: dict[str, str | Sequence[str] | None] = {
        "library_name": library,
        "pipeline_tag": facts.checkpoint.config.task,
        "base_model": facts.checkpoint.source.repo,
        "tags": [*family.model_types, *facts.targets, "gptconvert"],
    }
    lines = []
    for key, value in head.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_quoted(value)}")
        elif value is not None:
            lines += [f"{key}:", *(f"- {_quoted(item)}" for item in value)]
    return "\n".join(["---", *lines, "---", ""])


def _quoted(text: str) -> str:
    """A YAML scalar that can mean nothing but this string."""
    return json.dumps(printable(text), ensure_ascii=False)


def _introduction(facts: _Facts) -> str:
    source, titles = facts.checkpoint.source, [TARGET_TITLE.get(target, target) for target in facts.targets]
    origin = f"from `{printable(source.repo)}`" if source.repo else f"from a checkpoint ({source.format})"
    revision = f", revision `{printable(source.revision)}`" if source.revision else ""
    name = source.repo.rpartition("/")[2] if source.repo else family_named(facts.checkpoint.config.family).title
    return "\n".join(
        [
            f"# {printable(name)} as {' and '.join(titles)}",
            "",
            f"Converted {origin}{revision}. The weights are the checkpoint's own; the conversion changes their names",
            "and layout, and their type only if `--dtype` is given. Licence and limits are the checkpoint's.",
            "",
            "```sh",
            _command(facts),
            "```",
            "",
            "`manifest.json` lists the sources, versions and options with the digest of every file and tensor.",
            "`sha256sum -c SHA256SUMS` checks the files.",
            "",
        ]
    )


def _command(facts: _Facts) -> str:
    """The command that makes this directory again; only the place of a local checkpoint is left open."""
    source, config, options = facts.checkpoint.source, facts.checkpoint.config, facts.options
    words = ["gptconvert", "convert", printable(source.repo) if source.repo else "CHECKPOINT"]
    words += ["--revision", printable(source.revision)] if source.repo and source.revision else []
    words += [word for target in facts.targets for word in ("--to", target)]
    words += ["--task", config.task] if not facts.generates else []
    words += ["--n-head", str(config.n_head)] if not source.config else []
    words += ["--dtype", options.dtype] if options.dtype else []
    if "onnx" in facts.targets:
        words += ["--opset", str(options.opset)] if options.opset != DEFAULTS.opset else []
        words += ["--no-kv-cache"] if not options.kv_cache else []
        words += ["--single-file"] if options.single_file else []
    if "safetensors" in facts.targets and options.max_shard_size != DEFAULTS.max_shard_size:
        words += ["--max-shard-size", str(options.max_shard_size)]
    words += ["--xla"] if "tf" in facts.targets and options.xla else []
    words += ["--no-verify"] if not facts.verification else []
    return " ".join([*words, "-o", "OUTPUT"])


def _architecture(facts: _Facts) -> str:
    config, weights = facts.checkpoint.config, facts.checkpoint.weights.values()
    dtypes = sorted({str(weight.dtype.newbyteorder("=")) for weight in weights})
    rows = [
        ("Parameters", f"{sum(weight.size for weight in weights):,}"),
        ("Weights", f"{facts.checkpoint.nbytes:,} bytes, {', '.join(dtypes)}"),
        ("Layers", f"{config.n_layer}"),
        ("Width", f"{config.n_embd} (MLP {config.n_inner})"),
        ("Heads", f"{config.n_head} of {config.head_dim}"),
        ("Context", f"{config.n_ctx} tokens"),
        ("Vocabulary", f"{config.vocab_size} tokens"),
        ("Activation", config.activation),
        ("Output head", _head(facts)),
    ]
    return "\n".join(["## Architecture", "", *_table(("", ""), rows), ""])


def _head(facts: _Facts) -> str:
    if not facts.generates:
        return facts.checkpoint.config.task
    return "the token embedding" if facts.checkpoint.config.tied_head else "weights of its own"


def _files(facts: _Facts) -> str:
    if not facts.files:
        return ""
    rows = [(f"`{path}`", f"{nbytes:,}") for path, nbytes in facts.files.items()]
    return "\n".join(["## Files", "", *_table(("File", "Bytes"), rows), ""])


def _verification(facts: _Facts) -> str:
    """The verdict, without the figures: these differ from machine to machine, and a card does not."""
    if not facts.verification:
        text = "**Not verified.** The conversion ran with `--no-verify`: nobody has checked what these files compute."
        return f"## Verification\n\n{text}\n"
    report: Mapping[str, Any] = facts.verification
    rule = report.get("rule", {})
    mean, largest = (f"{rule.get(key, default):g}" for key, default in (("max_rmse_ratio", 4), ("max_abs_ratio", 8)))
    words = [
        "Checked before publication. Every weight equals the checkpoint's, byte for byte. Every output lies within",
        f"rounding noise of the same model in float64: its root mean square error is at most {mean} times, its",
        f"largest error at most {largest} times, that of the reference model in the computing type.",
    ]
    verdict = words if report.get("passed") else ["**Verification failed.**"]
    rows = [_artifact_row(artifact) for artifact in report.get("artifacts", ())]
    header = ("Artifact", "Equal weights", "Groups of probes within noise")
    return "\n".join(["## Verification", "", *verdict, "", *_table(header, rows), ""])


def _artifact_row(artifact: Mapping[str, Any]) -> tuple[str, str, str]:
    weights, runs = artifact.get("weights", {}), artifact.get("runs") or [{}]
    groups = runs[0].get("groups", ())
    passed = f"{sum(bool(group.get('ok')) for group in groups)} of {len(groups)}" if groups else "weights only"
    return f"`{printable(artifact.get('path'))}`", f"{weights.get('equal')} of {weights.get('weights')}", passed


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


@dataclass(frozen=True)
class _Snippet:
    """How one library loads the directory. ``text`` is a template over :func:`_values`."""

    title: str
    language: str
    when: Callable[[_Facts], bool]
    text: str


def _loading(facts: _Facts) -> str:
    parts = []
    for snippet in SNIPPETS:
        if snippet.when(facts):
            text = snippet.text.strip()
            for key, value in _values(facts).items():
                text = text.replace(f"«{key}»", value)
            parts += [f"{snippet.title}:", "", f"```{snippet.language}", text, "```", ""]
    return "\n".join(["## Use", "", *parts]) if parts else ""


def _values(facts: _Facts) -> dict[str, str]:
    config, graph = facts.checkpoint.config, facts.graph or ""
    read = 'Tokenizer.from_file("tokenizer.json").encode("Hello").ids'
    return {
        "graph": graph,
        "import tokenizers": "from tokenizers import Tokenizer\n" if facts.tokenized else "",
        "ids": read if facts.tokenized else "[0, 1, 2]",
        "output": "logits" if facts.generates else "last_hidden_state",
        "past": PAST.format(layers=config.n_layer, heads=config.n_head, head_dim=config.head_dim)
        if facts.options.kv_cache
        else "",
        "auto": "AutoModelForCausalLM" if facts.generates else "AutoModel",
        "js dtype": JS_DTYPE.get(graph.rpartition("/")[2], "fp32"),
    }


PAST = """past = np.zeros((1, {heads}, 0, {head_dim}), np.float32)  # no tokens seen yet
feed |= {{f"past_key_values.{{i}}.{{part}}": past for i in range({layers}) for part in ("key", "value")}}
"""

SNIPPETS = (
    _Snippet(
        "onnxruntime",
        "python",
        lambda facts: facts.graph is not None,
        """
import numpy as np
import onnxruntime
«import tokenizers»
session = onnxruntime.InferenceSession("«graph»")
ids = np.array([«ids»])
feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
«past»«output» = session.run(["«output»"], feed)[0]
""",
    ),
    _Snippet(
        "transformers",
        "python",
        lambda facts: "safetensors" in facts.targets and facts.generates and facts.tokenized,
        """
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
output = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(output[0]))
""",
    ),
    _Snippet(
        "transformers",
        "python",
        lambda facts: "safetensors" in facts.targets and not (facts.generates and facts.tokenized),
        """
from transformers import «auto»

model = «auto».from_pretrained(".")
""",
    ),
    _Snippet(
        "optimum",
        "python",
        lambda facts: facts.continues_text,
        """
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model, tokenizer = ORTModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
output = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(output[0]))
""",
    ),
    _Snippet(
        "transformers.js, with this directory at `models/my-model`",
        "js",
        lambda facts: facts.continues_text and facts.checkpoint.config.family in IN_TRANSFORMERS_JS,
        """
import { env, pipeline } from "@huggingface/transformers";

env.localModelPath = "models/";
env.allowRemoteModels = false;
const generate = await pipeline("text-generation", "my-model", { dtype: "«js dtype»" });
console.log(await generate("Hello", { max_new_tokens: 20 }));
""",
    ),
    _Snippet(
        "onnxruntime-genai",
        "python",
        lambda facts: facts.continues_text,
        """
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=32)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Hello"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
""",
    ),
)
