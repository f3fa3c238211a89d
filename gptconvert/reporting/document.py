"""The document that every format of ``--report`` renders: plain values, described by the schema ``report``."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from gptconvert.model.schema import SCHEMA_VERSION
from gptconvert.version import __version__

Document = Mapping[str, Any]

#: Faults that the verdict names.
MOST_NAMED = 2

#: Distributions whose versions a reader may need in order to repeat a result.
LIBRARIES = (
    "numpy",
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "tensorflow",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
)


def document(command: str, arguments: Sequence[str], *, ok: bool, **fields: object) -> dict[str, Any]:
    """The document of one run.

    Args:
        command: ``convert``, ``plan`` (a dry run), ``verify`` or ``quality``.
        arguments: the command line, without the program's name.
        ok: whether the command succeeded.
        fields: ``model``, ``source``, ``output``, ``artifact``, ``files``, ``verification``, ``graphs``, ``notes``,
            ``error``, as far as they are known.
    """
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "ok": ok,
        "command": command,
        "verdict": "",
        "created": _now(),
        "arguments": list(arguments),
        "environment": environment(),
        **fields,
    }
    found["verdict"] = verdict(found)
    return found


def environment() -> dict[str, object]:
    """The program, the machine and the installed libraries."""
    return {
        "gptconvert": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "libraries": dict(_installed()),
    }


def _installed() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _now() -> str:
    """UTC, to the second; ``SOURCE_DATE_EPOCH`` replaces it, for reproducible reports."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(epoch) if epoch.isdigit() else None))


def artifacts(found: Document) -> Sequence[Mapping[str, Any]]:
    """The verified artifacts; none if verification was skipped or did not begin."""
    verification: Mapping[str, Any] = found.get("verification") or {}
    return verification.get("artifacts") or ()


def measured(found: Document) -> list[Mapping[str, Any]]:
    """Every graph whose quality was measured, with ``path`` and ``size``."""
    verified = [
        {"path": artifact["path"], "size": artifact.get("size"), **artifact["quality"]}
        for artifact in artifacts(found)
        if artifact.get("quality")
    ]
    return [*verified, *(found.get("graphs") or ())]


def headline(found: Document) -> str:
    """The verdict in a word or two."""
    if not found["ok"]:
        failed = (found.get("error") or {}).get("kind", "verification") == "verification"
        return "Verification failed" if failed and found["command"] != "quality" else "Failed"
    if found["command"] == "plan":
        return "Dry run"
    if found["command"] == "quality":
        return "Measured"
    return "Verified" if artifacts(found) else "Not verified"


def verdict(found: Document) -> str:
    """The verdict in one or two sentences that need no knowledge of the method."""
    if not found["ok"]:
        return _failure(found)
    if found["command"] == "plan":
        return "The checkpoint can be converted. Nothing was written or verified."
    if found["command"] == "quality":
        return f"{_loss(found)}.".replace("the least", "The least", 1)
    lossy = [artifact["path"] for artifact in artifacts(found) if is_quantised(artifact)]
    exact = [artifact["path"] for artifact in artifacts(found) if not is_quantised(artifact)]
    if not (exact or lossy):
        return "The checkpoint was converted, but the result was not compared with it (--no-verify)."
    sentences = []
    if exact:
        computes, its = ("computes", "its number format") if len(exact) == 1 else ("compute", "their number formats")
        subject = _named(exact, "artifact")
        sentences.append(f"{subject} {computes} what the checkpoint computes, apart from the rounding of {its}.")
    if lossy:
        one = len(lossy) == 1
        smaller = (
            f"{_named(lossy, 'quantised graph')} {'is a' if one else 'are'} smaller approximation{'s' * (not one)}"
        )
        loss = f" and within {'its limit' if one else 'their limits'}: {_loss(found)}" if measured(found) else ""
        sentences.append(f"{smaller}, written as intended{loss}.")
    return " ".join(sentences)


def is_quantised(artifact: Mapping[str, Any]) -> bool:
    """Whether an artifact approximates its checkpoint on purpose."""
    tensors = artifact["weights"].get("tensors") or ()
    return bool(artifact.get("quality")) or any(tensor["dtype"].startswith(("int", "uint")) for tensor in tensors)


def _named(paths: Sequence[str], noun: str) -> str:
    """One or two names, or how many there are."""
    return listed(paths) if len(paths) < 3 else counted(len(paths), noun)


def _loss(found: Document) -> str:
    """How often the worst quantised graph predicts another token."""
    figures = [graph for graph in measured(found) if graph.get("top1") is not None]
    if not figures:
        return "Nothing could be measured"
    worst = min(figures, key=lambda graph: graph["top1"])
    name = worst["path"] if len(figures) == 1 else f"the least exact, {worst['path']},"
    return f"{name} prefers the same next token as the checkpoint in {worst['top1']:.1%} of cases"


def _failure(found: Document) -> str:
    """What failed, where, and what became of the output."""
    faults = [f"{artifact['path']}: {fault}" for artifact in artifacts(found) for fault in faults_of(artifact)]
    faults += [f"{graph['path']}: {fault}" for graph in found.get("graphs") or () for fault in quality_faults(graph)]
    faults += ((found.get("verification") or {}).get("package") or {}).get("problems") or []
    published = "Nothing was published. " if found["command"] == "convert" else ""
    if not faults:
        cause = str((found.get("error") or {}).get("message", "the command failed")).partition("\n")[0]
        return f"{published}The reason: {cause}."
    use = "" if published else "Do not use this export as it is. "
    shown = "; ".join(faults[:MOST_NAMED])
    more = f"; and {counted(len(faults) - MOST_NAMED, 'further fault')}" if len(faults) > MOST_NAMED else ""
    return f"{published}{use}{shown}{more}."


def faults_of(artifact: Mapping[str, Any]) -> list[str]:
    """Why an artifact failed, one sentence without a full stop per rule; none if it passed."""
    weights, found = artifact["weights"], []
    if weights["problems"]:
        wrong = len(weights["problems"])
        found.append(
            f"{counted(wrong, 'stored tensor')} {'differs' if wrong == 1 else 'differ'} from the checkpoint's"
        )
    for run in artifact["runs"]:
        if not run["ok"]:
            where = f"; the error begins in {run['first_bad_block']}" if run["first_bad_block"] else ""
            wrong = sum(not group["ok"] for group in run["groups"])
            found.append(f"the outputs of {wrong} of {len(run['groups'])} kinds of input are wrong{where}")
    if artifact["problems"]:
        found.append(
            f"{counted(len(artifact['problems']), 'deviation')} from the expected names, shapes, nodes or settings"
        )
    found += quality_faults(artifact.get("quality"))
    if not artifact["ok"] and not found:
        found.append("its outputs were not computed")
    return found


def quality_faults(quality: Mapping[str, Any] | None) -> list[str]:
    """Why a graph's quality is not good enough; none if it is."""
    if quality is None or quality["ok"]:
        return []
    if quality["problem"]:
        return [f"its quality was not measured: {quality['problem']}"]
    return [f"it loses {quality['kl_mean']:.2g} nats per token, more than the limit of {quality['max_kl']:g}"]


def worst_group(run: Mapping[str, Any]) -> tuple[float | None, str]:
    """The largest R of a run's outputs, keys and values, and its probe group. None is infinite or not measured."""
    ratios = [(m["ratio"], group["group"]) for group in run["groups"] for m in group["measures"][:2]]
    infinite = next(((None, name) for ratio, name in ratios if ratio is None), None)
    return infinite or max(ratios, default=(None, ""))


def listed(names: Sequence[str], most: int = 4) -> str:
    """``a, b and c``."""
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1]))) if shown else ""


def counted(count: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def ratio_text(ratio: float | None) -> str:
    """R for a table."""
    if ratio is None:
        return "∞"
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}" if ratio < 10000 else f"{ratio:.1e}"


def bytes_text(count: float | None) -> str:
    """1234567 → ``1.2 MB``."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def percent(share: float | None) -> str:
    """0.835 → ``83.5 %``."""
    return "–" if share is None else f"{share:.1%}".replace("%", " %")
