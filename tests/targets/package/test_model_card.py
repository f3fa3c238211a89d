"""The model card: valid YAML, accurate claims, snippets that run, nothing specific to the machine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml

from gptconvert.cli.convert import convert
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.export import Export
from gptconvert.model.options import Options
from gptconvert.targets.onnx.plan import plan as plan_onnx
from gptconvert.targets.package.model_card import model_card
from gptconvert.targets.package.sidecars import sidecar_files
from gptconvert.targets.safetensors.plan import plan as plan_safetensors
from gptconvert.targets.target import CardFacts
from gptconvert.verify.report import ArtifactReport, Report
from gptconvert.verify.weights import WeightReport
from tests.helpers import FIXTURES, checkpoint_of, openai_checkpoint, openai_layout, tiny_gpt2, write_planned

#: Target → planned path of its artifact.
PATHS = {"onnx": "onnx/model.onnx", "safetensors": "model.safetensors", "tf": "saved_model"}

CHECKED: dict[str, Any] = {
    "passed": True,
    "rule": {"max_rmse_ratio": 4.0, "max_abs_ratio": 8.0},
    "artifacts": [
        {
            "path": "onnx/model.onnx",
            "ok": True,
            "weights": {"ok": True, "weights": 28, "equal": 28},
            "runs": [{"groups": [{"group": "left padding", "ok": True}, {"group": "holes", "ok": True}]}],
            "seconds": 1.25,
        },
        {"path": "model.safetensors", "ok": True, "weights": {"ok": True, "weights": 29, "equal": 29}, "runs": []},
    ],
}


def text(
    checkpoint: Checkpoint,
    *targets: str,
    verification: Any = None,
    files: Mapping[str, int] | None = None,
    paths: Mapping[str, str] = PATHS,
    **options: Any,
) -> str:
    """The card of these targets' exports. Options given when opening stand; no verification means that it was off.

    Args:
        files: path → bytes of the directory; None: a directory with a tokenizer.
        paths: target → where its artifact is.
    """
    targets = targets or ("onnx",)
    given = Options(targets=targets, verify="default" if verification else None, **options)
    exports = tuple(Export(name, paths[name], checkpoint, ()) for name in targets)
    found = {"tokenizer.json": 1} if files is None else files
    facts = CardFacts(checkpoint, exports, given.opened_with(checkpoint.options), found)
    return model_card(facts, verification or {}).decode()


def front_matter(card_text: str) -> dict[str, Any]:
    assert card_text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card_text.split("---\n")[1])
    return found


def command(card_text: str) -> str:
    return next(line for line in card_text.splitlines() if line.startswith("gptconvert convert"))


def snippets(card_text: str) -> dict[str, str]:
    found = re.findall(r"\n([^\n]+):\n\n```(?:python|js)\n(.*?)```", card_text, re.DOTALL)
    return {title.partition(",")[0]: code for title, code in found}


@pytest.fixture
def tiny() -> Checkpoint:
    return checkpoint_of(*tiny_gpt2())


def test_front_matter(tiny: Checkpoint) -> None:
    head = front_matter(text(tiny, "safetensors", "onnx"))
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "onnx", "safetensors", "gptconvert"],
    }
    assert front_matter(text(tiny, "onnx"))["library_name"] == "onnx"


@pytest.mark.parametrize("repo", ["openai-community/gpt2", 'a: b"\n- x: #y', "no", "日本/モデル", "x\x7f\x85\x1b[0m"])
def test_front_matter_survives_any_name(repo: str) -> None:
    raw, arrays = tiny_gpt2()
    result = text(checkpoint_of(raw, arrays, repo=repo, revision="abc123"))
    assert set(front_matter(result)) == {"library_name", "pipeline_tag", "tags", "base_model"}
    assert isinstance(front_matter(result)["base_model"], str)
    if repo.isprintable():
        assert front_matter(result)["base_model"] == repo
    assert all(c.isprintable() or c == "\n" for c in result)
    assert "revision `abc123`" in result
    assert "--revision abc123" in command(result)


def test_hub_library_reads_it(tiny: Checkpoint) -> None:
    read = huggingface_hub.ModelCard(text(tiny, "safetensors"))
    assert read.data.library_name == "transformers"
    assert read.data.license is None
    assert read.text.strip().startswith("# GPT-2")


def test_command_repeats_the_options() -> None:
    raw, arrays = tiny_gpt2()
    bare = checkpoint_of(raw, arrays, request=Options(task="feature-extraction"))
    assert command(text(bare, "onnx", verification=CHECKED)) == (
        "gptconvert convert CHECKPOINT --to onnx --task feature-extraction -o OUTPUT"
    )
    full = {"dtype": "fp16", "opset": 18, "kv_cache": False, "single_file": True, "max_shard_size": 7}
    assert command(text(checkpoint_of(raw, arrays, repo="o/m"), "safetensors", "onnx", **full)) == (
        "gptconvert convert o/m --to onnx --to safetensors --dtype fp16 --opset 18 --no-kv-cache --single-file "
        "--max-shard-size 7 --no-verify -o OUTPUT"
    )


def test_command_is_accepted_by_the_command_line(tiny: Checkpoint) -> None:
    full = {"dtype": "fp16", "opset": 18, "kv_cache": False, "single_file": True, "max_shard_size": 7}
    words = command(text(tiny, "onnx", "safetensors", **full)).split()[2:]
    convert.make_context("convert", words, resilient_parsing=False)


def test_heads_are_repeated_if_no_configuration_records_them(tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2(n_inner=None)
    guessed = checkpoint_of(
        {}, openai_layout(arrays), tmp_path, scheme="openai-tf", request=Options(n_head=int(str(raw["n_head"])))
    )
    assert "--n-head 3" in command(text(guessed))
    assert "--n-head" not in command(text(openai_checkpoint(tmp_path)))


def test_skipped_verification_is_stated(tiny: Checkpoint) -> None:
    assert "Not verified" in text(tiny)
    assert "--no-verify" in command(text(tiny))
    checked = text(tiny, verification=CHECKED)
    assert "Not verified" not in checked
    assert "--no-verify" not in checked


def test_verdicts_are_shown_without_figures(tiny: Checkpoint) -> None:
    checked = text(tiny, verification=CHECKED)
    assert "| `onnx/model.onnx` | 28 of 28 | 2 of 2 |" in checked
    assert "| `model.safetensors` | 29 of 29 | not computed |" in checked
    assert "at most 4 times" in checked
    assert "1.25" not in checked
    bad = {"passed": False, "artifacts": [{"path": "a|b", "runs": [{"groups": [{"ok": False}, {"ok": True}]}]}]}
    failed = text(tiny, verification=bad)
    assert "Verification failed" in failed
    assert "| `a\\|b` | None of None | 1 of 2 |" in failed
    assert "within rounding noise" not in failed


def test_claims_only_the_checks_that_ran(tiny: Checkpoint) -> None:
    """Artifacts whose outputs were not computed are named; the rule on outputs names only the others."""
    onnx, safetensors = ({**CHECKED, "artifacts": [artifact]} for artifact in CHECKED["artifacts"])
    alone = text(tiny, "safetensors", verification=safetensors)
    assert "The outputs of `model.safetensors` were not computed" in alone
    assert "within rounding noise" not in alone
    assert "were not computed" not in text(tiny, verification=onnx)
    both = text(tiny, "onnx", "safetensors", verification=CHECKED)
    assert "The outputs of `model.safetensors` were not computed" in both
    assert "Every output of `onnx/model.onnx` is within rounding noise" in both


def test_a_real_report_is_understood(tiny: Checkpoint) -> None:
    weights = WeightReport(expected=28, equal=28)
    artifact = ArtifactReport("safetensors", "model.safetensors", weights, computes=False, seconds=3.5)
    found = Report("default", [artifact])
    assert found.passed
    with_figures = text(tiny, verification=found.as_dict())
    assert "| `model.safetensors` | 28 of 28 | not computed |" in with_figures
    assert with_figures == text(tiny, verification=found.as_dict(figures=False))


def test_architecture_and_files(tiny: Checkpoint) -> None:
    files = {"config.json": 2, "model.safetensors": 12345678}
    result = text(tiny, "safetensors", files=files)
    parameters = sum(int(np.prod(weight.shape)) for weight in tiny.weights.values())
    assert f"| Parameters | {parameters:,} |" in result
    assert f"| Weights | {4 * parameters:,} bytes, float32 |" in result
    assert "| Heads | 3 of 8 |" in result
    assert "| `model.safetensors` | 12,345,678 |" in result


def test_nothing_of_the_machine(tmp_path: Path) -> None:
    """The card is the same in two directories, without paths or dates."""
    cards = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        raw, arrays = tiny_gpt2()
        checkpoint = checkpoint_of(
            raw,
            arrays,
            tmp_path / name,
            path=str(tmp_path / name),
            config_path=str(tmp_path / name / "config.json"),
        )
        cards.append(text(checkpoint, "onnx", "safetensors", verification=CHECKED))
    assert cards[0] == cards[1]
    assert str(tmp_path) not in cards[0]
    assert not re.search(r"20\d\d-\d\d", cards[0])


def test_snippets_offered(tiny: Checkpoint) -> None:
    def titles(*targets: str, **options: Any) -> list[str]:
        return list(snippets(text(tiny, *targets, **options)))

    everything = ["onnxruntime", "optimum", "transformers.js", "onnxruntime-genai", "transformers"]
    assert titles("onnx", "safetensors") == everything
    assert titles("onnx", kv_cache=False) == ["onnxruntime", "optimum"]
    assert titles("safetensors") == ["transformers"]
    assert "## Use" not in text(tiny, "tf")
    assert "--xla" in command(text(tiny, "tf", xla=True))
    no_tokenizer = {"onnx/model.onnx": 1, "model.safetensors": 1}
    result = text(tiny, "onnx", "safetensors", files=no_tokenizer)
    assert list(snippets(result)) == ["onnxruntime", "transformers"]
    assert "tokenizer" not in "".join(snippets(result).values()).lower()


def test_graph_and_type_are_those_planned(tiny: Checkpoint) -> None:
    found = snippets(text(tiny, "onnx", paths={"onnx": "onnx/model_fp16.onnx"}))
    assert '"onnx/model_fp16.onnx"' in found["onnxruntime"]
    assert 'dtype: "fp16"' in found["transformers.js"]
    assert "transformers.js" not in snippets(text(tiny, "onnx", paths={"onnx": "onnx/model_bf16.onnx"}))


def test_positions_of_other_tasks_are_stated() -> None:
    raw, arrays = tiny_gpt2()
    sentence = "| Positions | count every token, padding included, as `transformers` does"
    for task, stated in (("text-generation", False), ("feature-extraction", True)):
        assert (sentence in text(checkpoint_of(raw, arrays, request=Options(task=task)), "onnx")) == stated


@pytest.mark.parametrize("kv_cache", [True, False, None])
@pytest.mark.parametrize("tokenized", [True, False])
@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_python_snippets_run(
    kv_cache: bool | None, tokenized: bool, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the onnxruntime and transformers snippets unchanged in the output directory."""
    found = {name: str(FIXTURES / "gpt2-stdlib" / name) for name in ("encoder.json", "vocab.bpe")}
    raw, arrays = tiny_gpt2(vocab_size=2003, bos_token_id=2002, eos_token_id=2002)
    checkpoint = checkpoint_of(raw, arrays, request=Options(task=task), tokenizer=found if tokenized else {})
    options = Options(kv_cache=kv_cache, targets=("onnx", "safetensors")).opened_with(checkpoint.options)
    exports = (*plan_onnx(checkpoint, options), *plan_safetensors(checkpoint, options))
    files = [*(file for export in exports for file in export.files), *sidecar_files(exports, options)]
    monkeypatch.chdir(write_planned(tmp_path, files))
    facts = CardFacts(checkpoint, exports, options, {file.path: file.nbytes for file in files})
    found = snippets(model_card(facts, {}).decode())
    space: dict[str, Any] = {}
    exec(found["onnxruntime"], space)
    output = space["logits" if task == "text-generation" else "last_hidden_state"]
    assert output.shape == (1, space["ids"].shape[1], 2003 if task == "text-generation" else 24)
    exec(found["transformers"], space)
    name = "GPT2LMHeadModel" if task == "text-generation" else "GPT2Model"
    assert type(space["model"]).__name__ == name


CARD: Mapping[str, object] = {
    "model_name": "poet-124M",
    "license": "mit",
    "license_link": "LICENSE",
    "language": ["sv", "no"],
    "base_model": "openai-community/gpt2",
    "datasets": ["org/poems"],
    "tags": ["poetry", "pytorch", "gpt2", "generated_from_trainer"],
}


def test_metadata_of_the_source_is_kept() -> None:
    card = text(checkpoint_of(*tiny_gpt2(), card=CARD))
    head = front_matter(card)
    assert {key: head[key] for key in CARD if key not in ("model_name", "tags")} == {
        key: value for key, value in CARD.items() if key not in ("model_name", "tags")
    }
    assert head["tags"] == ["gpt2", "onnx", "gptconvert", "poetry", "generated_from_trainer"]
    assert "# poet-124M as ONNX\n" in card
    assert "Converted from `poet-124M`." in card
    assert huggingface_hub.ModelCard(card).data.license == "mit"


def test_a_repository_is_the_base_model_of_its_conversion() -> None:
    card = text(checkpoint_of(*tiny_gpt2(), card=CARD, repo="me/poet", revision="abc"))
    assert front_matter(card)["base_model"] == "me/poet"
    assert "# poet as ONNX\n" in card
    assert "Converted from `me/poet`, revision `abc`." in card


def test_without_a_name_the_family_titles_the_card(tiny: Checkpoint) -> None:
    card = text(tiny)
    assert "# GPT-2 as ONNX\n" in card
    assert "DistilGPT-2" not in card


@pytest.mark.parametrize("value", ["a: b\n- x", "`code`", "x\x1b[0m", "|", "no"])
def test_metadata_of_strangers_stays_data(value: str) -> None:
    card = text(checkpoint_of(*tiny_gpt2(), card=dict.fromkeys(CARD, value)))
    head = front_matter(card)
    assert isinstance(head["license"], str)
    assert value.lower() not in ("no",) or head["language"] == "no"
    assert all(c.isprintable() or c == "\n" for c in card)
    assert set(head) == {*CARD, "library_name", "pipeline_tag"} - {"model_name"}


def test_a_strangers_name_is_no_markup_in_the_title() -> None:
    card = text(checkpoint_of(*tiny_gpt2(), card={"model_name": "<b>[poet](x)*"}))
    assert "b\\>\\[poet\\](x)\\* as ONNX\n" in card
    assert "<b>" not in card.partition("## Architecture")[0].replace("`<b>[poet](x)*`", "")


def test_head_is_worded_as_in_inspect() -> None:
    from gptconvert.cli.config_summary import config_summary

    checkpoint = checkpoint_of(*tiny_gpt2(tie_word_embeddings=False))
    shown = dict(config_summary(checkpoint.config.as_dict(), dataclasses.asdict(checkpoint.special_ids)))["head"]
    assert f"| Output head | {shown} |" in text(checkpoint)


def test_licences_are_carried_and_the_directory_names_nothing(tmp_path: Path) -> None:
    """Equal copies under different paths give equal outputs."""
    import shutil

    from gptconvert import pipeline

    outputs = []
    for name in ("first", "second"):
        source = Path(shutil.copytree(FIXTURES / "tiny-gpt2" / "hf-safetensors", tmp_path / name))
        (source / "README.md").write_text("---\nlicense: mit\nmodel-index:\n- name: poet\n---\n# Poet\n")
        (source / "LICENSE").write_bytes(b"terms\r\n")
        (source / "NOTICE.txt").write_bytes(b"notice")
        options = Options(targets=("safetensors",), verify=None)
        outputs.append(Path(pipeline.convert(source, tmp_path / f"{name} out", options).output))
    first, second = ({p.name: p.read_bytes() for p in out.iterdir()} for out in outputs)
    assert first == second
    assert (first["LICENSE"], first["NOTICE.txt"]) == (b"terms\r\n", b"notice")
    card = first["README.md"].decode()
    assert front_matter(card)["license"] == "mit"
    assert "# poet as" in card
    assert "(see `LICENSE`, `NOTICE.txt`)" in card
    assert b'"LICENSE"' in first["manifest.json"]
