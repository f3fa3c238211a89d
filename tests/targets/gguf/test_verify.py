"""GGUF files run in llama.cpp: every family is proven, and planted bugs fail in bytes, metadata or outputs."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gptconvert.containers.gguf import read_gguf
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.options import GGUF_TYPES, Options
from gptconvert.pipeline import open_checkpoint
from gptconvert.targets.foreign import find_candidates
from gptconvert.targets.gguf import foreign, layout, metadata, process
from gptconvert.targets.gguf import plan as planning
from gptconvert.targets.gguf import verify as verifying
from gptconvert.targets.gguf.plan import plan
from gptconvert.targets.verification import verify, verify_exports
from gptconvert.verify.evaluation import Amount, Evaluation
from gptconvert.verify.report import Report
from tests.commands import command
from tests.families import witness
from tests.families.witness import Case
from tests.helpers import FIXTURES, checkpoint_of, tiny_gpt2, write_planned

TRAINED = FIXTURES / "gpt2-stdlib"
#: Variants that llama.cpp computes.
NAMES = (
    "gpt2-text-generation",
    "gpt2-text-generation-untied",
    "gpt2-text-generation-unscaled",
    "gpt2-text-generation-scaled-by-layer",
    "gpt2-text-generation-erf",
    "gptj-text-generation",
    "gptj-text-generation-whole-head",
    "gptj-text-generation-tied",
    "codegen-text-generation-eight-heads",
    "gpt_neox-text-generation",
    "gpt_neox-text-generation-serial",
    "gpt_neox-text-generation-tied",
    "gpt_neox-text-generation-no-bias",
    "gpt_neox-text-generation-eps",
    "gpt_neox-text-generation-24-of-96",
    "gpt_neox-text-generation-linear-scaling",
)
CASES = [case for case in witness.CASES if str(case) in NAMES]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def exported(directory: Path, checkpoint: Checkpoint, *types: str, **options: Any) -> Report:
    """The report on the files of a checkpoint."""
    exports = plan(checkpoint, Options(targets=("gguf",), gguf_type=types, **options))
    for export in exports:
        write_planned(directory, export.files)
    return verify_exports(exports, str(directory))


def ratios(report: Report) -> list[float]:
    runs = [run for artifact in report.artifacts for run in artifact.runs]
    return [measure.ratio for run in runs for group in run.groups for measure in group.measures.values()]


def test_the_cases_exist() -> None:
    assert len(CASES) == len(NAMES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family(case: Case, directory: Path, tmp_path: Path) -> None:
    report = exported(tmp_path, witness.checkpoint(case, directory), "f32")
    assert report.passed, report.table()
    assert len(ratios(report)) == 5 and max(ratios(report)) < 2
    artifact = report.artifacts[0]
    assert artifact.weights.equal == artifact.weights.expected


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_every_type(family: str, tmp_path: Path, directory: Path) -> None:
    sizes = {"n_embd": 64, "n_head": 4, "n_inner": 96}
    checkpoint = witness.checkpoint(Case(family, keys=sizes, name="64"), directory)
    report = exported(tmp_path, checkpoint, *GGUF_TYPES)
    assert report.passed, report.table()
    assert max(ratios(report)) < 2.5
    for kind in GGUF_TYPES:
        path = tmp_path / f"{family}-{kind.upper()}.gguf"
        assert verify(find_candidates(checkpoint, str(path))).passed, kind


def test_split_files_run(tmp_path: Path, directory: Path) -> None:
    checkpoint = witness.checkpoint(Case("gptj"), directory)
    report = exported(tmp_path, checkpoint, "f16", max_shard_size=9_000)
    assert report.passed and len([*tmp_path.iterdir()]) > 2
    found = find_candidates(checkpoint, str(tmp_path))
    assert len(found) == 1 and verify(found).passed


@pytest.fixture(scope="module")
def stdlib() -> Checkpoint:
    return open_checkpoint(str(TRAINED))


def test_quality_of_quantised_weights(stdlib: Checkpoint, tmp_path: Path) -> None:
    exports = plan(stdlib, Options(targets=("gguf",), gguf_type=("q4_0",)))
    write_planned(tmp_path, exports[0].files)
    evaluation = Evaluation(stdlib, None, amount=Amount(2, 32, 2, 16))
    report = verify_exports(exports, str(tmp_path), evaluation=evaluation)
    quality = report.artifacts[0].quality
    assert quality is not None and quality.figures is not None and report.passed, report.table()
    assert quality.limit == 0.2 and 1e-3 < quality.figures.kl_mean < 0.2
    strict = dataclasses.replace(evaluation, max_kl=1e-4)
    report = verify_exports(exports, str(tmp_path), evaluation=strict)
    assert report.misses_limit and report.artifacts[0].quality.weights  # type: ignore[union-attr]


def edited(path: Path, key: str, value: float) -> None:
    """Change a number of the metadata in place."""
    reader = gguf.GGUFReader(path, "r+")
    reader.fields[key].parts[reader.fields[key].data[0]][0] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gpt2.attention.head_count", 6),
        ("gpt2.attention.layer_norm_epsilon", 1e-3),
        ("gpt2.context_length", 39),
        ("tokenizer.ggml.eos_token_id", 5),
    ],
)
def test_metadata_that_differs(key: str, value: float, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(*tiny_gpt2())
    exports = plan(checkpoint, Options(targets=("gguf",)))
    write_planned(tmp_path, exports[0].files)
    edited(tmp_path / exports[0].path, key, value)
    report = verify_exports(exports, str(tmp_path))
    assert not report.passed and key in str(report.artifacts[0].problems)


def test_a_weight_that_differs(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(*tiny_gpt2())
    exports = plan(checkpoint, Options(targets=("gguf",)))
    write_planned(tmp_path, exports[0].files)
    path = tmp_path / exports[0].path
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "blk.1.ffn_up.bias").data[3] += 1e-6
    reader.data.flush()
    report = verify_exports(exports, str(tmp_path))
    assert report.artifacts[0].weights.problems == [
        "blk.1.ffn_up.bias: differs from its source, first at element [3]"
    ]


def test_weights_of_another_model(tmp_path: Path) -> None:
    first, second = (checkpoint_of(*tiny_gpt2(seed)) for seed in (0, 1))
    write_planned(tmp_path, plan(first, Options(targets=("gguf",)))[0].files)
    assert verify(find_candidates(first, str(tmp_path))).passed
    report = verify(find_candidates(second, str(tmp_path)))
    assert not report.passed and report.artifacts[0].weights.equal == 0


def _changed(name: str, factor: float) -> Callable[[Any], dict[str, Any]]:
    def changed(config: Any) -> dict[str, Any]:
        found = metadata.architecture_metadata(config)
        key = next(key for key in found if key.endswith(name))
        found[key] = found[key] * factor if isinstance(found[key], float) else not found[key]  # type: ignore[operator]
        return found

    return changed


#: Bug → (family, function to replace in plan and verify, replacement): bytes and metadata then agree with the plan.
BUGS: dict[str, tuple[str, str, Any]] = {
    "rotary pairs stay adjacent": ("gptj", "in_file_order", lambda config, name, tensor: tensor),
    "scores are not scaled by layer": ("gpt2", "_scaled", lambda weight, rows, factor: weight),
    "rotary base": ("gpt_neox", "architecture_metadata", _changed("freq_base", 1.5)),
    "epsilon": ("gpt_neox", "architecture_metadata", _changed("epsilon", 100)),
    "serial for parallel": ("gpt_neox", "architecture_metadata", _changed("parallel_residual", 0)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_llama_cpp_shows_wrong_recipes(
    bug: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs of the layout or metadata that reading the file back cannot show."""
    family, function, replacement = BUGS[bug]
    keys = {"scale_attn_by_inverse_layer_idx": True} if family == "gpt2" else {}
    checkpoint = witness.checkpoint(Case(family, keys=keys, name="planted"), directory)
    for module in (layout, planning, foreign):
        if hasattr(module, function):
            monkeypatch.setattr(module, function, replacement)
    if family == "gpt2":  # the truth is the model as stored, which is then right: compare with the source's scales
        computed = layout.as_computed(checkpoint)
        monkeypatch.setattr(
            planning, "as_computed", lambda _: dataclasses.replace(computed, config=checkpoint.config)
        )
    report = exported(tmp_path, checkpoint, "f32")
    artifact = report.artifacts[0]
    assert artifact.weights.ok and not artifact.problems
    assert not report.passed and max(ratios(report)) > 20, report.table()


def test_a_file_that_llama_cpp_cannot_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails the verification, whatever the cause."""
    monkeypatch.setattr(layout, "gguf_name", lambda name: f"x.{name}")
    report = exported(tmp_path, checkpoint_of(*tiny_gpt2()), "f32")
    assert not report.passed and "the run failed" in str(report.artifacts[0].runs[0].groups[0].problems)


def test_without_llama_cpp(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes alone prove it, and a note, the card and the report say so; --strict refuses."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("xllamacpp", "gguf") else find(name)
    )
    words = ("openai-tf", FIXTURES / "tiny-gpt2" / "openai-tf", "--to", "gguf")
    done = command(capsys, *words, "-o", tmp_path / "out")
    assert done.code == 0 and "nothing ran it" in done.err and "xllamacpp" in done.err
    assert "outputs of `gpt2-F16.gguf` were not computed" in (tmp_path / "out" / "README.md").read_text()
    assert command(capsys, *words, "--strict", "-o", tmp_path / "strict").code == 3
    done = command(capsys, "generate", tmp_path / "out", "x", "--runtime", "gguf")
    assert done.code != 0


def test_files_of_llama_cpps_converter(tmp_path: Path, stdlib: Checkpoint) -> None:
    """It stores a tied head twice, and names of its own in the general metadata."""
    path = library_copy(stdlib, tmp_path / "model.gguf")
    report = verify(find_candidates(stdlib, str(path)))
    assert report.passed, report.table()
    edited(path, "gpt2.attention.layer_norm_epsilon", 1e-4)
    report = verify(find_candidates(stdlib, str(path)))
    assert not report.passed and "gpt2.attention.layer_norm_epsilon" in str(report.artifacts[0].problems)


def test_llama_cpp_tokenizes_as_the_checkpoint(tmp_path: Path, stdlib: Checkpoint) -> None:
    """Other rules for splitting text show in what it predicts after a text."""
    path = library_copy(stdlib, tmp_path / "model.gguf", pre="llama-bpe")
    report = verify(find_candidates(stdlib, str(path)))
    assert not report.passed and "llama.cpp tokenizes" in str(report.artifacts[0].problems)
    assert all(group.ok for group in report.artifacts[0].runs[0].groups)


def library_copy(checkpoint: Checkpoint, path: Path, pre: str = "gpt-2") -> Path:
    """The model as written by the gguf package."""
    config, writer = checkpoint.config, gguf.GGUFWriter(path, "gpt2")
    own = plan(checkpoint, Options(targets=("gguf",), gguf_type=("f16",)))[0]
    head = path.with_suffix(".own")
    write_planned(head.parent, [dataclasses.replace(own.files[0], path=head.name)])
    reader = gguf.GGUFReader(head)
    writer.add_name("copy")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(reader.fields["tokenizer.ggml.tokens"].contents())
    writer.add_token_merges(reader.fields["tokenizer.ggml.merges"].contents())
    writer.add_eos_token_id(config.vocab_size - 1)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data))
        if tensor.name == "token_embd.weight":
            writer.add_tensor("output.weight", np.asarray(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    head.unlink()
    return path


def test_the_process_is_confined(tmp_path: Path) -> None:
    """A file of unknown origin runs within limits, and the server needs no port and no file."""
    checkpoint = checkpoint_of(*tiny_gpt2())
    (export,) = plan(checkpoint, Options(targets=("gguf",)))
    write_planned(tmp_path, export.files)
    path = str(tmp_path / export.path)
    with process.LlamaProcess(process.limits_of(path, 1 << 20, 1 << 16, 97, 40, 400)) as confined:
        confined.load(path, 1 << 20, 40, 1)
        found = confined.log_probabilities([96, 0, 5], 97)
        assert found.shape == (97,) and abs(np.exp(found.astype(np.float64)).sum() - 1) < 1e-5
        with pytest.raises(process.LlamaError, match="context"):
            confined.log_probabilities([1] * 300, 97)


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    """At level full, and where llama.cpp is missing."""
    exports = plan(checkpoint_of(*tiny_gpt2()), Options(targets=("gguf",), gguf_type=("q8_0",)))
    write_planned(tmp_path, exports[0].files)
    report = verify_exports(exports, str(tmp_path), "full")
    assert report.passed and "length 39" in [group.name for group in report.artifacts[0].runs[0].groups]
    model = read_gguf(tmp_path / exports[0].path)
    assert [*verifying._second_reading(model)] == []
    first, second = (model.tensors[f"blk.{i}.ffn_up.bias"] for i in (0, 1))
    swapped = {**model.tensors, "blk.0.ffn_up.bias": second, "blk.1.ffn_up.bias": first}
    found = [*verifying._second_reading(dataclasses.replace(model, tensors=swapped))]
    assert [problem.split(":")[0] for problem in found] == ["blk.0.ffn_up.bias", "blk.1.ffn_up.bias"]
