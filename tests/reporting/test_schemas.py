"""Every JSON output satisfies its published schema, and has no key that the schema does not describe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from gptconvert.cli import COMMANDS
from gptconvert.pipeline import matrix
from gptconvert.reporting.schemas import COMMON, NAMES, load
from tests.commands import ORIGINALS, TINY, TRAINED, command
from tests.reporting.runs import SOURCE, broken, converted, valid

#: Command → name of its schema.
SCHEMAS = {name: "convert" if module == "convert" else name for name, (module, _) in COMMANDS.items()}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quantised = ("--to", "onnx,safetensors", "--quantize", "q4", "--max-kl", "10")
    return converted(tmp_path_factory.mktemp("export") / "out", *quantised)


def result(capsys: Any, name: str, *arguments: object) -> Any:
    """The valid output of a command that succeeds."""
    done = command(capsys, *arguments)
    assert done.code == 0, done.err
    return valid(name, done.json)


def test_every_command_has_a_schema() -> None:
    assert {*SCHEMAS.values()} <= {*NAMES}


def test_conversions(tmp_path: Path, capsys: Any) -> None:
    options = ("--to", "onnx,safetensors", "--quantize", "q4", "--max-kl", "10", "--json")
    found = result(capsys, "convert", "hf", SOURCE, "-o", tmp_path / "a", *options)
    assert found["source"]["files"][0].keys() == {"name", "size", "sha256"}
    result(capsys, "convert", "convert", TINY / "openai-tf", "-o", tmp_path / "b", "--no-verify", "--json")
    result(capsys, "plan", "hf", SOURCE, "-o", tmp_path / "c", "--dry-run", "--json")


@pytest.mark.parametrize("name", ["manifest.json", "unverified"])
def test_manifest(export: Path, tmp_path: Path, name: str) -> None:
    directory = export if name == "manifest.json" else converted(tmp_path / "out", "--no-verify")
    valid("manifest", json.loads((directory / "manifest.json").read_text()))


def test_commands_on_an_export(export: Path, capsys: Any) -> None:
    result(capsys, "inspect", "inspect", SOURCE, "--json")
    verified = result(capsys, "verify", "verify", SOURCE, export, "--max-kl", "10", "--json")
    assert {artifact["kind"] for artifact in verified["verification"]["artifacts"]} == {"onnx", "safetensors"}
    result(capsys, "quality", "quality", export, "--json", "--max-kl", "10")


def test_generated_text(tmp_path: Path, capsys: Any) -> None:
    export = tmp_path / "out"
    assert command(capsys, "openai-tf", TRAINED, "-o", export, "--no-verify").code == 0
    assert result(capsys, "generate", "generate", export, "a", "--max-new-tokens", "2", "--json")["ok"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    beams = ("--num-beams", "2", "--num-return-sequences", "2", "--max-new-tokens", "2")
    done = command(capsys, "generate", export, "--prompts", tmp_path / "prompts.jsonl", *beams)
    found = [valid("generate", json.loads(line)) for line in done.out.splitlines()]
    assert [(each["line"], each["ok"]) for each in found] == [(1, True), (2, False)]
    assert [len(each["continuations"]) for each in found if each["ok"]] == [2]


def test_batch(tmp_path: Path, capsys: Any) -> None:
    jobs = [
        {"source": str(TINY / "openai-tf"), "output": str(tmp_path / "a"), "options": {"verify": None}},
        {"source": "x"},
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(f"{json.dumps(job)}\n" for job in jobs))
    done = command(capsys, "batch", tmp_path / "jobs.jsonl")
    found = [valid("batch", json.loads(line)) for line in done.out.splitlines()]
    assert sorted((each["line"], each["status"]) for each in found) == [(1, "converted"), (2, "failed")]
    found = valid("batch", command(capsys, "batch", tmp_path / "jobs.jsonl", "--json").json)
    assert sorted((each["line"], each["status"]) for each in found["jobs"]) == [(1, "skipped"), (2, "failed")]


def test_every_kind_of_checkpoint_is_inspected(capsys: Any) -> None:
    found = [command(capsys, "inspect", path, "--json") for path in sorted(ORIGINALS.iterdir()) if path.is_dir()]
    opened = [valid("inspect", done.json) for done in found if done.code == 0]
    assert len({each["family"] for each in opened}) > 2
    assert any(each["config"]["rotary"] for each in opened)


def test_commands_about_the_program(capsys: Any) -> None:
    result(capsys, "formats", "formats", "--json")
    result(capsys, "version", "--version", "--json")
    result(capsys, "version", "--json", "--version")
    result(capsys, "schema", "schema", "--json")
    assert result(capsys, "schema", "schema", "plan", "--json")["schema"] == load("plan")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("formats", "schema")])
def test_errors(name: str, capsys: Any, tmp_path: Path) -> None:
    arguments = {"verify": [tmp_path / "b"], "generate": ["text"], "push": ["org/name"]}.get(name, [])
    done = command(capsys, name, tmp_path / "missing", *arguments, "--json")
    assert done.code
    found = valid(SCHEMAS[name], done.json)
    assert (found["ok"], found["error"]["exit_code"]) == (False, done.code)
    assert valid(SCHEMAS[name], command(capsys, name, "--nonsense", "--json").json)["error"]["kind"] == "usage"


def test_failed_verifications(export: Path, tmp_path: Path, capsys: Any) -> None:
    done = command(capsys, "verify", SOURCE, broken(export, tmp_path / "broken"), "--max-kl", "10", "--json")
    assert done.code == 5
    assert valid("verify", done.json)["verification"]["passed"] is False
    limited = ("--quantize", "q4", "--max-kl", "1e-12", "--json")
    done = command(capsys, "hf", SOURCE, "-o", tmp_path / "out", *limited)
    assert done.code == 5
    assert valid("convert", done.json)["error"]["kind"] == "verification"
    done = command(capsys, "quality", export, "--max-kl", "1e-12", "--json")
    assert (done.code, valid("quality", done.json)["ok"]) == (5, False)


def test_graph_of_another_program(tmp_path: Path, capsys: Any) -> None:
    """Its weights are found by content, and some may be judged by the outputs alone."""
    import onnx

    directory = converted(tmp_path / "out")
    path = directory / "onnx" / "model.onnx"
    model = onnx.load_model(path, load_external_data=False)
    model.producer_name = "another"
    path.write_bytes(model.SerializeToString())
    found = valid("verify", command(capsys, "verify", SOURCE, path, "--json").json)
    runs = found["verification"]["artifacts"][0]["runs"]
    assert [run["stressed"] for run in runs] == [False, *[True] * (len(runs) - 1)]
    assert len(runs) > 1


def test_files_are_valid_schemas_and_refer_to_existing_definitions() -> None:
    from jsonschema import Draft202012Validator

    shipped = {path.name.removesuffix(".json") for path in _files()}
    assert shipped == {COMMON, *NAMES}
    for name in NAMES:
        schema = load(name)
        Draft202012Validator.check_schema(schema)
        assert schema["$id"].endswith(f"/{name}.json")
        assert COMMON not in json.dumps({k: v for k, v in schema.items() if k != "$id"})


def test_every_shared_definition_is_used() -> None:
    used = {definition for name in NAMES for definition in load(name).get("$defs", {})}
    shared = next(path for path in _files() if path.name == f"{COMMON}.json")
    assert used == {*json.loads(shared.read_text(encoding="utf-8"))["$defs"]}


def _files() -> Iterator[Any]:
    return (p for p in resources.files("gptconvert.reporting.schemas").iterdir() if p.name.endswith(".json"))


def test_a_schema_is_printed(capsys: Any) -> None:
    assert command(capsys, "schema", "manifest").json == load("manifest")
    assert "report" in command(capsys, "schema").out
    assert command(capsys, "schema", "nonsense").code == 2


def test_a_missing_key_is_found() -> None:
    from jsonschema import ValidationError

    with pytest.raises(ValidationError, match="'notes' is a required property"):
        valid("verify", {"schema_version": 1, "ok": True})
    with pytest.raises(ValidationError, match="Additional properties"):
        valid("formats", {**json.loads(json.dumps(matrix())), "schema_version": 1, "ok": True, "more": 1})
