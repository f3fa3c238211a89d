"""The model card: README.md of an output directory, with YAML front matter for the Hugging Face hub.

The card is reproducible: it contains no local paths or dates, and a local directory's name does not title it. Name,
licence, languages, base model, data sets and tags are those of the source's card, which come from strangers.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from gptconvert.errors import printable
from gptconvert.families.registry import family_named
from gptconvert.model.blocks import Quantised
from gptconvert.model.ggml import GgmlQuantised
from gptconvert.model.int8 import Int8Rows
from gptconvert.sources.documents import is_licence
from gptconvert.targets.registry import target_named
from gptconvert.targets.target import CardFacts, Target

#: Name of the card.
CARD_FILE = "README.md"
#: Targets whose library the hub's front matter names, the preferred one first.
LIBRARY_OF = ("safetensors", "onnx", "gguf", "tflite")
#: Tags about the files of the source, which the output need not have.
FORMAT_TAGS = frozenset("pytorch tf jax flax rust tflite onnx coreml openvino gguf safetensors keras".split())

#: Target whose files have their types in their names → its name in text.
TYPED: Mapping[str, str] = {"gguf": "GGUF", "tflite": "LiteRT"}

#: How a graph that is not a language model's numbers tokens.
POSITIONS = "count every token, padding included, as `transformers` does unless it is given `position_ids`"


ROUNDED = (
    "Checked before publication. Every weight equals the checkpoint's, byte for byte, or in quantised graphs "
    "what the recipe of its quantisation makes of it."
)
#: What the limit in the table of graphs means.
LOSSES = (
    "Quantised weights are rounded, so these graphs predict slightly different probabilities. Their mean KL",
    "divergence from the checkpoint's, in nats per token of text, is below the limit in the table. Their outputs",
    "were compared with the model of the rounded weights, without the rounding of activations. Measure the figures,",
    "also on your own text:",
    "",
    "```sh",
    "gptconvert quality OUTPUT --against CHECKPOINT",
    "```",
)
#: The same without ONNX graphs, which alone ``gptconvert quality`` measures.
LOSSES_IN_GGUF = (
    "Quantised weights are rounded, so these files predict slightly different probabilities. The mean KL divergence",
    "of the model of the rounded weights from the checkpoint, in nats per token of text, is below the limit in the",
    "table.",
)
#: The same of LiteRT files.
LOSSES_IN_LITERT = (
    "Quantised weights are rounded, so these files predict slightly different probabilities. Their mean KL",
    "divergence from the checkpoint's, in nats per token of text, is below the limit in the table. Their outputs",
    "were compared with the model of the rounded weights, without the rounding of activations.",
)
#: Target → what its quantised artifacts lose. The first that has some explains them.
LOSSES_OF: Mapping[str, Sequence[str]] = {"onnx": LOSSES, "tflite": LOSSES_IN_LITERT, "gguf": LOSSES_IN_GGUF}


def model_card(facts: CardFacts, verification: Mapping[str, object]) -> bytes:
    """README.md for a set of exports.

    Args:
        facts: the exports and the options.
        verification: the report (``verify.Report.as_dict``) without figures; empty if verification was skipped, which
            the card states.
    """
    sections = (
        _front_matter(facts),
        _introduction(facts),
        _architecture(facts),
        _verification(verification),
        _graphs(facts, verification),
        _files(facts),
        _loading(facts),
    )
    return "\n".join(filter(None, sections)).encode()


def _targets(facts: CardFacts) -> list[Target]:
    return [target_named(name) for name in sorted({export.target for export in facts.exports})]


def library_of(targets: Collection[str]) -> str | None:
    """The hub's name of the library that loads an output with these targets; None if it has no name for it."""
    return next((target_named(name).library for name in LIBRARY_OF if name in targets), None)


def _front_matter(facts: CardFacts) -> str:
    targets = {target.name: target for target in _targets(facts)}
    family = family_named(facts.checkpoint.config.family)
    card = facts.checkpoint.source.card
    head: dict[str, Any] = {
        **{key: card.get(key) for key in ("license", "license_name", "license_link", "language")},
        "library_name": library_of(targets),
        "pipeline_tag": facts.checkpoint.config.task,
        "base_model": facts.checkpoint.source.repo or card.get("base_model"),
        "datasets": card.get("datasets"),
        "tags": _tags([*family.model_types, *targets, "gptconvert"], card.get("tags")),
    }
    lines = []
    for key, value in head.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_quoted(value)}")
        elif value is not None:
            lines += [f"{key}:", *(f"- {_quoted(item)}" for item in value)]
    return "\n".join(["---", *lines, "---", ""])


def _tags(own: Sequence[str], source: object) -> list[str]:
    """Our tags, and the source's except those that name the formats of its files."""
    further = [source] if isinstance(source, str) else source if isinstance(source, list) else []
    return list(dict.fromkeys([*own, *(tag for tag in further if tag.lower() not in FORMAT_TAGS)]))


def _quoted(text: str) -> str:
    """Quote a string so that YAML reads it as a string."""
    return json.dumps(printable(text), ensure_ascii=False)


def _introduction(facts: CardFacts) -> str:
    source, titles = facts.checkpoint.source, [target.short_title or target.title for target in _targets(facts)]
    named = source.repo or _name(facts)
    revision = f", revision `{printable(source.revision)}`" if source.revision else ""
    origin = f"from `{printable(named)}`" if named else f"from a checkpoint ({source.format})"
    adapter = source.adapter
    if adapter is not None and (named or adapter.repo):  # else the format names it
        origin += f", with the LoRA adapter `{printable(adapter.repo)}`" if adapter.repo else ", with a LoRA adapter"
    name = named.rpartition("/")[2] if named else family_named(facts.checkpoint.config.family).title.partition(",")[0]
    own = "the checkpoint's own" if adapter is None else "the checkpoint's, with the adapter merged"
    changed = "their type only if `--dtype` is given"
    named_types = [title for target, title in TYPED.items() if facts.all_of(target)]
    changed += f", and in {' and '.join(named_types)} files to the type in their names" if named_types else ""
    changed += ", or `--quantize`, which rounds them" if facts.options.quantize else ""
    return "\n".join(
        [
            f"# {_plain(printable(name))} as {' and '.join(titles)}",
            "",
            f"Converted {origin}{revision}. The weights are {own}; the conversion changes their names",
            f"and layout, and {changed}. {_licence(facts)}",
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


def _name(facts: CardFacts) -> str | None:
    """The model's name in the source's card, without characters that would end Markdown's code."""
    name = facts.checkpoint.source.card.get("model_name")
    return name.replace("`", "'").strip() or None if isinstance(name, str) else None


def _plain(name: str) -> str:
    """Escape what Markdown would read as HTML, a link or emphasis."""
    return re.sub(r"[\\<>\[\]*]", r"\\\g<0>", name)


def _licence(facts: CardFacts) -> str:
    files = sorted(filter(is_licence, facts.checkpoint.source.documents))
    stated = f" (see {', '.join(f'`{printable(name)}`' for name in files)})" if files else ""
    return f"Licence and limits are the checkpoint's{stated}."


def _command(facts: CardFacts) -> str:
    """The command that reproduces this directory, with placeholders for local paths."""
    source = facts.checkpoint.source
    words = ["gptconvert", "convert", printable(source.repo) if source.repo else "CHECKPOINT"]
    words += ["--revision", printable(source.revision)] if source.repo and source.revision else []
    return shlex.join([*words, *map(printable, facts.options.command_words()), "-o", "OUTPUT"])


def _architecture(facts: CardFacts) -> str:
    config, weights = facts.checkpoint.config, facts.checkpoint.weights.values()
    dtypes = sorted({str(weight.dtype.newbyteorder("=")) for weight in weights})
    rounded = any(
        isinstance(weight, Quantised | GgmlQuantised | Int8Rows) for weight in weights
    )  # stored in several types: the graphs' table
    rows = [
        ("Parameters", f"{sum(weight.size for weight in weights):,}"),
        *([] if rounded else [("Weights", f"{facts.checkpoint.nbytes:,} bytes, {', '.join(dtypes)}")]),
        ("Layers", f"{config.n_layer}"),
        ("Width", f"{config.n_embd} (MLP {config.n_inner})"),
        ("Heads", f"{config.n_head} of {config.head_dim}"),
        ("Context", f"{config.n_ctx} tokens"),
        ("Vocabulary", f"{config.vocab_size} tokens"),
        ("Activation", config.activation),
        ("Output head", _head(facts)),
        *([] if facts.generates else [("Positions", POSITIONS)]),
    ]
    return "\n".join(["## Architecture", "", *_table(("", ""), rows), ""])


def _head(facts: CardFacts) -> str:
    if not facts.generates:
        return facts.checkpoint.config.task
    return "the token embedding" if facts.checkpoint.config.tied_head else "separate weights"


def _files(facts: CardFacts) -> str:
    if not facts.files:
        return ""
    rows = [(f"`{path}`", f"{nbytes:,}") for path, nbytes in sorted(facts.files.items())]
    return "\n".join(["## Files", "", *_table(("File", "Bytes"), rows), ""])


def _verification(report: Mapping[str, Any]) -> str:
    """The checks and their results, without figures, which differ between machines."""
    if not report:
        text = "**Not verified.** The conversion ran with `--no-verify`."
        return f"## Verification\n\n{text}\n"
    artifacts = report.get("artifacts", ())
    words = _checks(report, artifacts) if report.get("passed") else ["**Verification failed.**"]
    rows = [_artifact_row(artifact) for artifact in artifacts]
    header = ("Artifact", "Equal weights", "Outputs: groups of probes within noise")
    return "\n".join(["## Verification", "", *words, "", *_table(header, rows), ""])


def _graphs(facts: CardFacts, verification: Mapping[str, Any]) -> str:
    """The variants of an artifact, and what they lose."""
    rows = [row for target in _targets(facts) for row in target.graphs(facts, verification)]
    if not rows:
        return ""
    table = _table(("Graph", "Bytes", "Use", "Proof"), [(f"`{path}`", f"{n:,}", *text) for path, n, *text in rows])
    lines = ["## Graphs", "", *table, ""]
    lossy = {each["kind"] for each in verification.get("artifacts", ()) if each.get("quality")}
    if lossy:
        lines += [*next(words for target, words in LOSSES_OF.items() if target in lossy), ""]
    return "\n".join(lines)


def _checks(report: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]]) -> list[str]:
    words = ["Checked before publication. Every weight equals the checkpoint's, byte for byte."]
    if any(artifact.get("quality") for artifact in artifacts):
        words = [ROUNDED]
    if any(not a.get("runs") for a in artifacts):
        names = ", ".join(f"`{printable(a['path'])}`" for a in artifacts if not a.get("runs"))
        words.append(f"The outputs of {names} were not computed: loading them is up to the library that reads them.")
    run: dict[str, list[str]] = {}
    for artifact in artifacts:
        if artifact.get("runs"):
            yardstick = artifact["runs"][0].get("yardstick", "the reference model\nin the computing type")
            run.setdefault(yardstick, []).append(artifact["path"])
    rule = report.get("rule", {})
    mean, largest = (f"{rule.get(k, default):g}" for k, default in (("max_rmse_ratio", 4), ("max_abs_ratio", 8)))
    for yardstick, paths in run.items():
        names = ", ".join(f"`{printable(path)}`" for path in paths)
        words += [
            f"Every output of {names} is within rounding noise of the same model in float64: its root mean square",
            f"error is at most {mean} times, its largest error at most {largest} times, that of {yardstick}.",
        ]
    return words


def _artifact_row(artifact: Mapping[str, Any]) -> tuple[str, str, str]:
    weights, runs = artifact.get("weights", {}), artifact.get("runs") or [{}]
    groups = runs[0].get("groups", ())
    passed = f"{sum(bool(group.get('ok')) for group in groups)} of {len(groups)}" if groups else "not computed"
    return f"`{printable(artifact.get('path'))}`", f"{weights.get('equal')} of {weights.get('weights')}", passed


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _loading(facts: CardFacts) -> str:
    parts = []
    for snippet in (snippet for target in _targets(facts) for snippet in target.snippets):
        code, remark = snippet.code(facts), snippet.remark(facts)
        if code is not None:
            aside = f" ({remark})" if remark else ""
            title = f"{snippet.title}, with {snippet.where}" if snippet.where else snippet.title
            parts += [f"{title}{aside}:", "", f"```{snippet.language}", code.strip(), "```", ""]
        elif remark:
            parts += [f"{snippet.title}: {remark}.", ""]
    return "\n".join(["## Use", "", *parts]) if parts else ""
