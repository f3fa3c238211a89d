"""Exit codes, stdout and stderr, which scripts depend on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from gptconvert.cli import COMMANDS, run
from tests.commands import TINY, TRAINED, command, tree

Capture = pytest.CaptureFixture[str]


def test_help_of_every_command(capsys: Capture) -> None:
    assert set(COMMANDS) >= {"openai-tf", "hf", "convert", "inspect", "verify", "generate", "formats"}
    for name in COMMANDS:
        outcome = command(capsys, name, "--help")
        assert outcome.code == 0, name
        assert outcome.out.startswith("Usage: gptconvert " + name)


def test_help_does_not_import_heavy_libraries() -> None:
    code = (
        "import sys\nfrom gptconvert.cli import run\nrun(['--help'])\n"
        "heavy = {'numpy', 'torch', 'onnx', 'onnxruntime', 'tensorflow', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(','.join(heavy) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_inspect_does_not_import_frameworks() -> None:
    code = (
        f"import sys\nfrom gptconvert.cli import run\nassert run(['inspect', {str(TINY / 'openai-tf')!r}]) == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tensorflow', 'huggingface_hub', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(','.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def test_without_arguments_shows_the_commands(capsys: Capture) -> None:
    outcome = command(capsys)
    assert "openai-tf" in outcome.out + outcome.err


def test_shell_completion(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("_GPTCONVERT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "gptconvert ope")
    monkeypatch.setenv("COMP_CWORD", "1")
    outcome = command(capsys)
    assert (outcome.out.strip(), outcome.err) == ("plain,openai-tf", "")


def test_unknown_command_suggests_a_similar_one(capsys: Capture) -> None:
    outcome = command(capsys, "openai_tf", "x")
    assert outcome.code == 2
    assert "Did you mean openai-tf?" in outcome.err


@pytest.mark.parametrize(
    "args",
    [
        ("convert",),
        ("convert", TINY / "openai-tf", "--opset", "16"),
        ("convert", TINY / "openai-tf", "--opset", "22"),
        ("convert", TINY / "openai-tf", "--dtype", "fp8"),
        ("convert", TINY / "openai-tf", "--to", "coreml"),
        ("convert", TINY / "openai-tf", "--max-shard-size", "lots"),
        ("convert", TINY / "openai-tf", "--n-head", "0"),
        ("convert", TINY / "openai-tf", "--n-head", "4"),
        ("generate",),
    ],
)
def test_usage_errors_exit_2(args: tuple[object, ...], capsys: Capture, tmp_path: Path) -> None:
    extra = ("-o", tmp_path / "out") if args[0] == "convert" else ()
    outcome = command(capsys, *args, *extra)
    assert outcome.code == 2
    assert outcome.err
    assert not outcome.out
    assert not (tmp_path / "out").exists()


def test_json_is_one_object_even_on_failure(capsys: Capture, tmp_path: Path) -> None:
    good = command(capsys, "convert", TINY / "openai-tf", "-o", tmp_path / "out", "--no-verify", "--json")
    assert good.json["ok"] is True
    assert good.json["schema_version"] == 1
    again = command(capsys, "convert", TINY / "openai-tf", "-o", tmp_path / "out", "--json")
    assert again.code == 6
    assert again.json["ok"] is False
    assert again.json["error"]["exit_code"] == 6
    usage = command(capsys, "convert", TINY / "openai-tf", "--opset", "3", "--json")
    assert usage.code == usage.json["error"]["exit_code"] == 2


def test_dry_run_shows_the_plan_without_writing(capsys: Capture, tmp_path: Path) -> None:
    args = (
        "openai-tf",
        TINY / "openai-tf",
        "--to",
        "onnx",
        "--to",
        "safetensors",
        "-o",
        tmp_path / "out",
        "--dry-run",
    )
    plan = command(capsys, *args, "--json").json
    assert list(tmp_path.iterdir()) == []
    files = {file["path"]: file for file in plan["files"]}
    data = files["onnx/model.onnx_data"]
    assert data["transformed"] == []
    assert data["copied"] > 0.9 * data["size"]
    human = command(capsys, *args)
    assert "onnx/model.onnx_data" in human.out
    half = command(capsys, *args, "--dtype", "bf16", "--json").json
    assert len({f["path"]: f for f in half["files"]}["onnx/model_bf16.onnx_data"]["transformed"]) == data["tensors"]


def test_planned_sizes_equal_written_sizes(capsys: Capture, tmp_path: Path) -> None:
    args = ("hf", TINY / "hf-variant", "--to", "onnx", "--to", "safetensors", "-o", tmp_path / "out", "--json")
    planned = command(capsys, *args, "--dry-run").json
    command(capsys, *args, "--no-verify")
    assert {file["path"] for file in planned["files"]} == set(tree(tmp_path / "out"))
    assert planned["size"] == sum(file["size"] or 0 for file in planned["files"])
    for file in planned["files"]:
        if file["size"] is None:
            assert file["path"] in ("README.md", "manifest.json", "SHA256SUMS")
        else:
            assert (tmp_path / "out" / file["path"]).stat().st_size == file["size"], file["path"]


@pytest.mark.parametrize("make", [lambda out: (out / "x").mkdir(parents=True), lambda out: out.write_text("")])
def test_dry_run_fails_where_the_conversion_would(
    capsys: Capture, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "out")
    args = ("convert", TINY / "openai-tf", "-o", tmp_path / "out", "--no-verify")
    real, dry = command(capsys, *args), command(capsys, *args, "--dry-run")
    assert (dry.code, dry.out, dry.err) == (6, "", real.err)
    assert "output exists" in dry.err


def test_dry_run_lists_the_files_of_unknown_size(capsys: Capture, tmp_path: Path) -> None:
    done = command(capsys, "convert", TINY / "openai-tf", "-o", tmp_path / "out", "--dry-run")
    assert [line.split() for line in done.out.splitlines()][-3:] == [["README.md"], ["manifest.json"], ["SHA256SUMS"]]


def test_only_force_replaces_an_existing_output(capsys: Capture, tmp_path: Path) -> None:
    args = ("convert", TINY / "openai-tf", "-o", tmp_path / "out", "--no-verify", "-q")
    assert command(capsys, *args).code == 0
    (tmp_path / "out/mine.txt").write_text("mine")
    before = tree(tmp_path)
    assert command(capsys, *args).code == 6
    assert tree(tmp_path) == before
    assert command(capsys, *args, "--force").code == 0
    assert not (tmp_path / "out/mine.txt").exists()


def test_default_output_is_named_after_the_source(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in (TINY / "openai-tf", TINY / "openai-tf/model.ckpt", TINY / "openai-tf/checkpoint"):
        assert command(capsys, "convert", source, "--no-verify", "-q", "--force").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["openai-tf-gptconvert"]


def test_verify_passes_a_good_export_and_fails_a_changed_one(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(capsys, "convert", TINY / "openai-tf", "-o", out, "--no-verify", "-q").code == 0
    assert command(capsys, "verify", TINY / "openai-tf", out).code == 0
    data = out / "onnx/model.onnx_data"
    content = bytearray(data.read_bytes())
    content[5003] ^= 0x40
    data.write_bytes(content)
    bad = command(capsys, "verify", TINY / "openai-tf", out, "--json")
    assert bad.code == 5
    assert bad.json["ok"] is False
    other = command(capsys, "verify", TINY / "openai-tf-bf16", out)
    assert other.code == 5


def test_verify_flag_in_any_position(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(capsys, "convert", "--verify", TINY / "openai-tf", "-o", out, "-q").code == 0
    assert json.loads((out / "manifest.json").read_text())["verification"]["passed"] is True


def test_inspect(capsys: Capture) -> None:
    found = command(capsys, "inspect", TINY / "openai-tf-adam", "--json").json
    assert found["config"]["n_layer"] == 2
    assert found["dropped"]["model/wpe/Adam"] == "optimizer slot"
    assert {t["name"] for t in found["tensors"]} >= {"model/wte", "model/h1/mlp/c_proj/w"}
    human = command(capsys, "inspect", TINY / "openai-tf-adam")
    assert "Would be dropped" in human.out


def test_steps(capsys: Capture, tmp_path: Path) -> None:
    assert command(capsys, "inspect", TINY / "openai-tf-adam", "--step", 10, "--json").code == 0
    missing = command(capsys, "inspect", TINY / "openai-tf-adam", "--step", 11)
    assert missing.code == 3
    assert "10" in missing.err
    assert "20" in missing.err


def test_formats_is_generated_from_the_registries(capsys: Capture) -> None:
    from gptconvert.families.registry import FAMILIES
    from gptconvert.model.options import INFO

    found = command(capsys, "formats", "--json").json
    assert [f["name"] for f in found["families"]] == [f.name for f in FAMILIES]
    assert tuple(v["name"] for v in found["variants"]) == INFO["quantize"].choices
    markdown = command(capsys, "formats", "--markdown").out
    assert markdown.strip() in (TINY.parents[1] / "docs/formats.md").read_text()


def test_commands_cover_the_formats() -> None:
    from gptconvert.sources.detect import FORMATS

    assert {f.command for f in FORMATS} <= set(COMMANDS)


def test_target_choices_equal_the_registry() -> None:
    from gptconvert.cli.convert import convert
    from gptconvert.targets.registry import TARGETS

    (to,) = (p for p in convert.params if p.name == "targets")
    context = click.Context(convert)
    assert [item.value for item in to.type.shell_complete(context, to, "")] == list(TARGETS)
    assert to.type.get_metavar(to, context) == f"[{'|'.join(TARGETS)}]"


def test_task_choices_equal_the_models() -> None:
    from gptconvert.cli.convert import convert
    from reference_model.config import TASKS

    (task,) = (p for p in convert.params if p.name == "task")
    assert list(task.type.choices) == list(TASKS)  # type: ignore[attr-defined]


def test_generate_streams_the_greedy_text_of_the_witness(capsys: Capture, tmp_path: Path) -> None:
    import numpy as np

    golden = np.load(TRAINED / "golden.npz")
    assert command(capsys, "openai-tf", TRAINED, "-o", tmp_path / "out", "--no-verify", "-q").code == 0
    prompt = str(golden["prompt"])
    outcome = command(capsys, "generate", tmp_path / "out", prompt, "--max-new-tokens", 20)
    assert outcome.out == prompt + str(golden["greedy_text"]) + "\n"


def test_generate_is_seeded(capsys: Capture, tmp_path: Path) -> None:
    command(capsys, "openai-tf", TRAINED, "-o", tmp_path / "out", "--no-verify", "-q")
    args = ("generate", tmp_path / "out", "The class", "--max-new-tokens", 12, "--json")
    texts = [
        command(capsys, *args, "--seed", seed, "--top-k", 40, "--temperature", 3).json["text"] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    cold = command(capsys, *args, "--temperature", 0).json["text"]
    assert cold == command(capsys, *args, "--top-k", 1).json["text"] == command(capsys, *args).json["text"]


def test_generate_without_a_tokenizer_is_an_error(capsys: Capture, tmp_path: Path) -> None:
    command(capsys, "openai-tf", TINY / "openai-tf", "-o", tmp_path / "out", "--no-verify", "-q")
    outcome = command(capsys, "generate", tmp_path / "out", "x")
    assert outcome.code == 3
    assert "tokenizer.json" in outcome.err


def test_closed_pipe_gives_no_traceback() -> None:
    args = f"{sys.executable} -m gptconvert inspect {TINY / 'openai-tf'} | head -1"
    done = subprocess.run(args, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_unexpected_error_is_reported_without_a_traceback(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("gptconvert.inspection.inspect", broken)
    outcome = command(capsys, "inspect", TINY / "openai-tf")
    assert outcome.code == 1
    assert "boom" in outcome.err
    assert "Traceback" not in outcome.err
    with pytest.raises(RuntimeError):
        run(["--debug", "inspect", str(TINY / "openai-tf")])


def test_verify_of_a_missing_artifact(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    done = command(capsys, "verify", TINY / "openai-tf", tmp_path / "exprt")
    assert done.code == 3
    assert f"{tmp_path}/exprt: no such file or directory" in done.err
    assert f"did you mean {tmp_path}/export?" in done.err
    assert "hub" not in done.err


def test_verify_of_other_files(capsys: Capture, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "export.tar.gz", "w:gz") as archive:
        archive.add(TINY / "openai-tf", "export")
    packed = command(capsys, "verify", TINY / "openai-tf", tmp_path / "export.tar.gz")
    assert packed.code == 4
    assert "unpack it" in packed.err
    (tmp_path / "model.onnx_data").write_bytes(b"x")
    data = command(capsys, "verify", TINY / "openai-tf", tmp_path / "model.onnx_data")
    assert data.code == 4
    assert "hint: pass a directory" in data.err
