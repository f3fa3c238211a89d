"""Reports of real runs: passing, failing, lossy, planned, and of errors."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from gptconvert.reporting.charts import GATE, MILDEST_BUG
from gptconvert.reporting.document import verdict
from gptconvert.reporting.files import FORMATS
from gptconvert.verify.metrics import MAX_RMSE_RATIO
from tests.commands import REPOSITORY, command, tree
from tests.reporting.runs import SOURCE, broken, converted, valid

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self.open}:
            self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


class Reports:
    """All formats of one run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.options = [word for suffix in FORMATS for word in ("--report", str(directory / f"r{suffix}"))]

    def read(self, suffix: str) -> str:
        return (self.directory / f"r.{suffix}").read_text(encoding="utf-8")

    @property
    def page(self) -> Page:
        return Page(self.read("html"))

    @property
    def suites(self) -> ET.Element:
        return ET.fromstring(self.read("xml"))

    @property
    def json(self) -> Any:
        return valid("report", json.loads(self.read("json")))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a command with every kind of report; returns its exit code and the reports."""
    from gptconvert.cli import run as main

    def command_with_reports(*arguments: object) -> tuple[int, Reports]:
        reports = Reports(tmp_path_factory.mktemp("reports"))
        return main([*map(str, arguments), *reports.options, "-q"]), reports

    return command_with_reports


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("export") / "out")


@pytest.fixture(scope="module")
def lossy(run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reports, Path]:
    """The reports of a conversion with quantised graphs, and its output."""
    output = tmp_path_factory.mktemp("lossy") / "out"
    quantised = ("--to", "onnx,safetensors", "--quantize", "q8", "--quantize", "q4", "--max-kl", "10")
    code, reports = run("hf", SOURCE, "-o", output, *quantised)
    assert code == 0
    return reports, output


@pytest.fixture(scope="module")
def failed(run: Any, export: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """The reports of an export whose second block is wrong."""
    code, reports = run("verify", SOURCE, broken(export, tmp_path_factory.mktemp("broken") / "out"))
    assert code == 5
    return reports


def test_a_page_is_self_contained(lossy: tuple[Reports, Path], failed: Reports) -> None:
    for reports in (lossy[0], failed):
        page = reports.page
        assert not {"script", "link", "iframe", "object", "embed", "img"} & page.tags.keys()
        assert not any(key.startswith("on") for _, key, _ in page.attributes)
        targets = [*page.values("href"), *page.values("src"), *page.values("xlink:href")]
        assert all(target.startswith("#") for target in targets)
        assert "@import" not in reports.read("html") and not re.search(r"url\((?!#)", reports.read("html"))


def test_charts_have_text_alternatives_and_unique_identifiers(lossy: tuple[Reports, Path]) -> None:
    page = lossy[0].page
    assert page.tags["svg"] == 8  # two per graph, and two on quality
    assert page.values("role") == ["img"] * 8
    labels = page.values("aria-label")
    assert all(re.search(r"\d", label) for label in labels)
    assert sum("gate is 4" in label for label in labels) == 3
    identifiers = page.values("id")
    assert len(identifiers) == len({*identifiers}) > 0
    referred = {target[1:] for target in page.values("xlink:href")}
    assert referred <= {*identifiers}


def test_charts_use_the_colours_of_the_page(lossy: tuple[Reports, Path]) -> None:
    drawings = re.findall(r"<svg.*?</svg>", lossy[0].read("html"), re.DOTALL)
    assert all("var(--ink)" in drawing and not re.search(r"#[0-9a-f]{6}", drawing) for drawing in drawings)


def test_verdict_comes_first_and_names_the_loss(lossy: tuple[Reports, Path]) -> None:
    text = " ".join(" ".join(lossy[0].page.text).split())
    assert text.index("Verified") < text.index("What was converted") < text.index("How to read")
    assert "onnx/model.onnx and model.safetensors compute what the checkpoint computes" in text
    assert "onnx/model_quantized.onnx and onnx/model_q4.onnx are smaller approximations" in text
    share = re.search(
        r"onnx/model_q4.onnx, prefers the same next token as the checkpoint in ([\d.]+)% of cases", text
    )
    assert share is not None
    graphs = {a["path"]: a.get("quality") for a in lossy[0].json["verification"]["artifacts"]}
    assert float(share[1]) == round(100 * graphs["onnx/model_q4.onnx"]["top1"], 1)


def test_digests_are_those_of_the_files(lossy: tuple[Reports, Path]) -> None:
    reports, output = lossy
    listed = dict(line.split("  ")[::-1] for line in (output / "SHA256SUMS").read_text().splitlines())
    page, summary = reports.read("html"), reports.read("md")
    assert all(digest in page and digest in summary for digest in listed.values())
    manifest = json.loads((output / "manifest.json").read_text())
    assert all(file["sha256"] in page for file in manifest["source"]["files"])
    assert reports.json["source"]["files"] == manifest["source"]["files"]


def test_every_stored_tensor_is_listed_by_layer(lossy: tuple[Reports, Path]) -> None:
    page = lossy[0].read("html")
    weights = lossy[0].json["verification"]["artifacts"][0]["weights"]
    assert {tensor["weight"] for tensor in weights["tensors"]} >= {"wte.weight", "h.1.mlp.c_proj.bias", "ln_f.bias"}
    assert len(weights["tensors"]) == weights["weights"] == weights["equal"]
    assert all(f"<code>{tensor['tensor']}</code>" in page for tensor in weights["tensors"])
    assert page.count("<summary>layer 1") == 4


def test_reports_are_outside_the_output(lossy: tuple[Reports, Path]) -> None:
    assert not any(name.startswith("r.") for name in tree(lossy[1]))


def test_junit_has_a_case_per_probe_group_and_rule(lossy: tuple[Reports, Path]) -> None:
    suites = lossy[0].suites
    names = [suite.get("name") for suite in suites]
    graphs = ["onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_q4.onnx"]
    expected = [name for graph in graphs for name in (graph, f"{graph}: onnxruntime, default options")]
    assert names == [*expected, "model.safetensors"]
    groups = [group["group"] for group in lossy[0].json["verification"]["artifacts"][0]["runs"][0]["groups"]]
    assert [case.get("name") for case in suites[1].iter("testcase")] == groups
    assert len([*suites[2].iter("testcase")]) == 3  # weights, contract, quality
    assert suites.get("tests") == str(sum(1 for _ in suites.iter("testcase")))
    assert (suites.get("failures"), suites.get("errors")) == ("0", "0")


def test_graphs_on_quantised_weights_are_approximations_too(lossy: tuple[Reports, Path]) -> None:
    """Those that share the weights of another are not measured themselves."""
    found = lossy[0].json
    for artifact in found["verification"]["artifacts"]:
        artifact.pop("quality", None)
    text = " ".join(" ".join(Page(FORMATS[".html"]({**found, "verdict": verdict(found)})).text).split())
    assert "onnx/model_quantized.onnx and onnx/model_q4.onnx are smaller approximations, written as intended." in text


def test_deep_models_have_readable_axes(failed: Reports) -> None:
    """Labels of 48 blocks do not touch."""
    found = failed.json
    run = found["verification"]["artifacts"][0]["runs"][0]
    names = ["embedding", *(f"h.{i}" for i in range(48)), "logits"]
    run["blocks"] = [{"tensor": name, "ratio": 1.0, "ok": True} for name in names]
    drawing = re.findall(r"<svg.*?</svg>", FORMATS[".html"](found), re.DOTALL)[1]
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", drawing)
    assert [label for label in labels if label.isdigit() and int(label) not in (1, 10, 100)] == [
        "8",
        "16",
        "24",
        "32",
        "40",
    ]
    assert {"embedding", "logits"} <= {*labels}


def test_a_fault_can_be_seen(failed: Reports) -> None:
    run = failed.json["verification"]["artifacts"][0]["runs"][0]
    blocks = {block["tensor"]: block for block in run["blocks"]}
    assert run["first_bad_block"] == "block 1"
    assert [name for name, block in blocks.items() if not block["ok"]] == ["h.1", "logits"]
    assert blocks["embedding"]["ratio"] < GATE and blocks["h.0"]["ratio"] < GATE < blocks["h.1"]["ratio"]
    order = ["embedding", "present.0.key", "present.0.value", "h.0", "present.1.key", "present.1.value", "h.1"]
    assert [*blocks] == [*order, "logits"]
    assert "The error begins in block 1." in failed.read("html")
    assert any("outside the limits from block 1 on" in label for label in failed.page.values("aria-label"))


def test_a_failure_is_reported_with_its_location(failed: Reports) -> None:
    failures = [*failed.suites.iter("failure")]
    assert any("the error begins in block 1" in (failure.text or "") for failure in failures)
    assert any("approximate is" in (failure.text or "") for failure in failures)
    assert any(re.search(r"logits: R \d", failure.text or "") for failure in failures)
    assert failed.json["ok"] is False
    assert failed.json["error"]["exit_code"] == 5
    text = " ".join(" ".join(failed.page.text).split())
    assert "Verification failed" in text and "Do not use this export" in text
    assert "❌ Verification failed" in failed.read("md") and "block 1" in failed.read("md")


def test_a_refused_conversion_is_reported(run: Any, tmp_path: Path) -> None:
    code, reports = run("hf", SOURCE, "-o", tmp_path / "out", "--quantize", "q4", "--max-kl", "1e-12")
    assert code == 5
    assert not (tmp_path / "out").exists()
    found = reports.json
    assert found["verdict"].startswith("Nothing was published. onnx/model_q4.onnx: it loses ")
    assert found["source"]["files"][0]["sha256"]
    failure = next(reports.suites.iter("failure"))
    assert (failure.get("type"), "more than the limit of 1e-12" in (failure.text or "")) == ("quality", True)
    assert "loses most in" in reports.read("html")


def test_an_error_is_reported(run: Any, tmp_path: Path) -> None:
    code, reports = run("hf", tmp_path / "missing", "-o", tmp_path / "out")
    assert code == 3
    error = next(reports.suites.iter("error"))
    assert error.get("type") == "input"
    assert str(tmp_path / "missing") in (error.text or "")
    assert "no such file" in reports.read("html") and "no such file" in reports.read("md")
    assert reports.json["error"]["exit_code"] == 3


@pytest.mark.parametrize(("option", "word"), [("--dry-run", "Dry run"), ("--no-verify", "Not verified")])
def test_what_was_not_verified_is_said(run: Any, tmp_path: Path, option: str, word: str) -> None:
    code, reports = run("hf", SOURCE, "-o", tmp_path / "out", option)
    assert code == 0
    assert word in "".join(reports.page.text) and f"⚪ {word}" in reports.read("md")
    assert next(reports.suites.iter("skipped")).get("message") == option
    assert (reports.suites.get("tests"), reports.suites.get("skipped")) == ("1", "1")
    assert reports.json["command"] == ("plan" if option == "--dry-run" else "convert")
    assert "onnx/model.onnx" in reports.read("html")


def test_names_from_files_are_harmless(lossy: tuple[Reports, Path], failed: Reports) -> None:
    """In HTML, Markdown, XML and charts."""
    hostile = "_<script>alert('x')</script> $\\frac | `a` \x00\x1b\ud800 & \"b\" *c*.onnx"
    for reports in (lossy[0], failed):
        found = reports.json
        for artifact in found["verification"]["artifacts"]:
            for text in [artifact["path"], "h.1.mlp", "length 1"]:
                artifact = _replaced(artifact, text, hostile)
            found["verification"]["artifacts"] = [artifact]
            page = Page(FORMATS[".html"](found))
            assert not {"script"} & page.tags.keys()
            ET.fromstring(FORMATS[".xml"](found))
            table = next(line for line in FORMATS[".md"](found).splitlines() if "alert" in line and line[0] == "|")
            assert len(re.findall(r"(?<!\\)\|", table)) == 7


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(each, old, new) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, old, new) for each in value]
    return value.replace(old, new) if isinstance(value, str) else value


def test_figures_that_json_cannot_express(failed: Reports) -> None:
    """R may be infinite, and a run may have problems without any figure."""
    found = failed.json
    run = found["verification"]["artifacts"][0]["runs"][0]
    for figure in (*run["blocks"], *run["groups"][0]["measures"]):
        figure["ratio"] = None
    run["groups"][1] |= {"measures": [], "similarity": {}, "problems": ["the run failed: no"]}
    page = Page(FORMATS[".html"](found))
    assert any("∞" in label for label in page.values("aria-label"))
    assert "∞" in FORMATS[".md"](found)
    assert "the run failed: no" in FORMATS[".xml"](found) and "the run failed: no" in "".join(page.text)


def test_quality(run: Any, lossy: tuple[Reports, Path]) -> None:
    code, reports = run("quality", lossy[1], "--max-kl", "10")
    assert code == 0
    assert [len([*suite.iter("testcase")]) for suite in reports.suites] == [1, 1, 1]
    assert "Quality by position" in reports.read("html") and "mean KL" in reports.read("md")
    code, reports = run("quality", lossy[1], "--max-kl", "1e-12")
    assert code == 5
    assert len([*reports.suites.iter("failure")]) == 2
    assert reports.json["verdict"].startswith("Do not use this export")


def test_quality_by_position(lossy: tuple[Reports, Path]) -> None:
    quality = lossy[0].json["verification"]["artifacts"][2]["quality"]
    ranges = [(each["first"], each["last"]) for each in quality["by_position"]]
    assert ranges[:3] == [(0, 0), (1, 1), (2, 3)]
    assert all(last + 1 == first for (_, last), (first, _) in itertools.pairwise(ranges))
    tokens = [each["tokens"] for each in quality["by_position"]]
    assert sum(tokens) == quality["tokens"]
    for figure in ("kl_mean", "top1"):
        mean = sum(each[figure] * each["tokens"] for each in quality["by_position"]) / quality["tokens"]
        assert mean == pytest.approx(quality[figure])


def test_output_with_json_is_unchanged(export: Path, tmp_path: Path, capsys: Any) -> None:
    done = command(capsys, "verify", SOURCE, export, "--json", "--report", tmp_path / "r.md")
    assert (done.code, valid("verify", done.json)["ok"]) == (0, True)
    assert "✅ Verified" in (tmp_path / "r.md").read_text()


def test_the_gate_and_the_mildest_bug_are_those_of_the_documentation() -> None:
    rows = re.findall(r"^\|[^|]+\| \d+ \| ([\d.e]+)[^|]*\|", _documented(), re.MULTILINE)
    assert MAX_RMSE_RATIO == GATE
    assert min(float(row) for row in rows if float(row) > 1) * GATE == MILDEST_BUG


def _documented() -> str:
    return (REPOSITORY / "docs" / "verification.md").read_text(encoding="utf-8")
