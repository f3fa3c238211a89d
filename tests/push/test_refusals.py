"""What is refused before the first request, and failures of the hub at each request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import TINY, command
from tests.push.hub_server import TOKEN, Hub, Repo

REPO = "org/name"


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def rewrite(export: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest, and its line in SHA256SUMS."""
    path = export / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    sign(export)


def sign(export: Path) -> None:
    """Write SHA256SUMS again, as a user might after editing a file by hand."""
    names = [str(p.relative_to(export)) for p in export.rglob("*") if p.is_file() and p.name != "SHA256SUMS"]
    done = subprocess.run(["sha256sum", *names], cwd=export, capture_output=True, check=True)
    (export / "SHA256SUMS").write_bytes(done.stdout)


# --- Before the first request ---------------------------------------------------------------------------------------


def test_everything_that_is_wrong_with_the_files_at_once(hub: Hub, export: Path, capsys: Any) -> None:
    append(export / "model.safetensors")
    append(export / "onnx" / "model.onnx_data")
    (export / "config.json").unlink()
    (export / "onnx" / "model_q8.onnx").write_bytes(b"")
    (export / "more").symlink_to("onnx")
    (export / ".DS_Store").write_bytes(b"")
    with (export / "SHA256SUMS").open("a") as file:
        file.write("nonsense\n")
    done = command(capsys, "push", export, REPO)
    assert done.code == 3
    problems = [line.strip() for line in done.err.splitlines()[1:-1]]
    assert problems == [
        "SHA256SUMS: cannot be read: 'nonsense'",
        "config.json: missing",
        "more: not listed in SHA256SUMS",
        "onnx/model_q8.onnx: not listed in SHA256SUMS",
        "model.safetensors: altered",
        "onnx/model.onnx_data: altered",
    ]
    assert hub.requests == []


def test_checksums_that_were_written_again(hub: Hub, export: Path, capsys: Any) -> None:
    append(export / "model.safetensors")
    (export / "more.txt").write_text("more")
    sign(export)
    done = command(capsys, "push", export, REPO)
    assert done.code == 3
    assert "model.safetensors: altered after it was verified" in done.err
    assert "more.txt: not listed in manifest.json" in done.err
    assert hub.requests == []


def test_an_output_that_was_not_verified(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    assert command(capsys, "hf", TINY / "hf-safetensors", "-o", tmp_path / "out", "--no-verify").code == 0
    done = command(capsys, "push", tmp_path / "out", REPO, "--json")
    assert (done.code, done.json["error"]["kind"]) == (5, "verification")
    assert "the conversion was not verified" in done.err
    assert "convert again without --no-verify" in done.err
    assert hub.requests == []


def fail_one(manifest: Any) -> None:
    manifest["verification"]["artifacts"][1]["ok"] = False


def drop_one(manifest: Any) -> None:
    manifest["verification"]["artifacts"] = manifest["verification"]["artifacts"][:1]


def fail_all(manifest: Any) -> None:
    manifest["verification"]["passed"] = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fail_one, "that every artifact is verified: onnx/model_q4.onnx"),
        (drop_one, "that every artifact is verified: safetensors"),
        (fail_all, "that every artifact is verified\n"),
    ],
)
def test_a_report_that_does_not_pass(
    hub: Hub, export: Path, capsys: Any, change: Callable[[Any], None], message: str
) -> None:
    rewrite(export, change)
    done = command(capsys, "push", export, REPO)
    assert done.code == 5
    assert message in done.err
    assert hub.requests == []


@pytest.mark.parametrize("key", ["verification", "files", "source", "config", "targets"])
@pytest.mark.parametrize("value", [3, [3], None, [{"artifacts": [3]}]])
def test_a_manifest_of_another_kind(hub: Hub, export: Path, capsys: Any, key: str, value: object) -> None:
    rewrite(export, lambda manifest: manifest.update({key: value}))
    done = command(capsys, "push", export, REPO)
    assert done.code in (3, 5)
    assert "bug" not in done.err
    assert hub.requests == []


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS"])
def test_a_directory_of_another_program(hub: Hub, export: Path, capsys: Any, name: str) -> None:
    (export / name).unlink()
    done = command(capsys, "push", export, REPO)
    assert done.code == 3
    assert f"not the output of a conversion: {name} missing" in done.err
    assert command(capsys, "push", export / "config.json", REPO).code == 3


def test_a_card_that_cannot_be_read(hub: Hub, export: Path, capsys: Any) -> None:
    for text in ("---\n- a\n---\n", "---\na: [\n---\n", "---\n1: 2\n---\n", "---\nmodel-index: 3\n---\n"):
        (export / "README.md").write_text(text)
        done = command(capsys, "push", export, REPO)
        assert done.code == 3
        assert "the model card's front matter cannot be read" in done.err
    (export / "README.md").write_bytes(b"\xff")
    assert command(capsys, "push", export, REPO).code == 3
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name"], "not a complete repository name"),
        (["org/a/b"], "not a valid repository name"),
        (["org/na me"], "not a valid repository name"),
        (["https://hub.example/org/name"], "not a valid repository name"),
        ([REPO, "--branch", "main"], "the default branch is not written to directly"),
        ([REPO, "--branch", "a", "--pr", "1"], "--branch contradicts --pr"),
        ([REPO, "--branch", "refs/heads/main"], "not a valid name for git"),
        ([REPO, "--branch", "a..b"], "not a valid name for git"),
        ([REPO, "--tag", "a b"], "not a valid name for git"),
        ([REPO, "--tag", "a.lock"], "not a valid name for git"),
        ([REPO, "--message", "x"], "expected 3 to 200 characters"),
        ([REPO, "--license", ""], "the text is empty"),
        ([REPO, "--pr", "0"], "0 is not in the range"),
    ],
)
def test_usage(hub: Hub, exported: Path, capsys: Any, arguments: list[str], message: str) -> None:
    done = command(capsys, "push", exported, *arguments)
    assert done.code == 2
    assert message in done.err
    assert hub.requests == []


def test_not_logged_in(hub: Hub, exported: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = command(capsys, "push", exported, REPO)
    assert done.code == 6
    assert "not logged in to the hub" in done.err
    assert "run `hf auth login`" in done.err
    assert hub.requests == []


def test_offline(hub: Hub, exported: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = command(capsys, "push", exported, REPO)
    assert (done.code, "HF_HUB_OFFLINE is set" in done.err, hub.requests) == (6, True, [])


# --- Failures of the hub --------------------------------------------------------------------------------------------

#: Requests of a push with a tag, in three commits, and what each leaves behind if it fails.
STEPS = {
    "info": "nothing was uploaded",
    "refs": "nothing was uploaded",
    "validate": "nothing was uploaded",
    "open": "nothing was uploaded; an empty draft pull request may have been created",
    "details": "nothing was uploaded; an empty draft pull request may have been created",
    "preupload": "the default branch is unchanged; pull request {url}/discussions/1 holds 0 of 3 commits",
    "batch": "holds 0 of 3 commits; run again with --pr 1 to go on, or close it",
    "put": "holds 0 of 3 commits",
    "verify": "holds 0 of 3 commits",
    "commit": "holds 1 of 3 commits",
    "tree": "holds 3 of 3 commits",
    "status": "holds 3 of 3 commits",
    "tag": "holds 3 of 3 commits",
}
#: Status → a part of the message.
STATUS = {
    401: "the hub does not accept the token",
    403: "the token may not write to this repository",
    404: "no such repository, branch or pull request",
    500: "the hub failed; found HTTP 500",
    -1: "the hub cannot be reached",
}


@pytest.mark.parametrize("status", STATUS)
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_leaves_the_default_branch_as_it_was(
    hub: Hub, exported: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, step: str, status: int
) -> None:
    monkeypatch.setattr("gptconvert.push.plan.MAX_FILES", 4)
    repo = hub.repos[REPO] = Repo()
    head = repo.refs["main"]
    hub.fail, hub.after = {step: status}, {"commit": 1}
    if (step, status) == ("info", 404):
        hub.fail["create"] = 404  # else the repository is taken for one that does not exist
    done = command(capsys, "push", exported, REPO, "--tag", "v1", "--json")
    assert (done.code, done.json["error"]["kind"]) == (6, "output")
    assert STATUS[status] in done.err
    if (step, status) != ("info", 404):
        assert STEPS[step].format(url=f"{hub.endpoint}/{REPO}") in done.json["error"]["hint"]
    assert repo.refs["main"] == head and repo.contents("main") == {}
    assert "refs/tags/v1" not in repo.refs
    assert "open" not in repo.pull_requests.values() or step == "tag"


@pytest.mark.parametrize("step", ["create", "branch"])
def test_other_failures(hub: Hub, exported: Path, capsys: Any, step: str) -> None:
    hub.fail = {step: 503}
    done = command(capsys, "push", exported, REPO, "--branch", "v2")
    assert done.code == 6
    assert "the hub failed; found HTTP 503: planted" in done.err
    assert "nothing was uploaded" in done.err


def test_a_branch_that_was_left_behind(hub: Hub, exported: Path, capsys: Any) -> None:
    hub.fail = {"commit": 429}
    done = command(capsys, "push", exported, REPO, "--branch", "v2")
    assert "uploading: too many requests" in done.err
    assert "branch v2 holds 0 of 1 commits; run the same command again to go on, or delete the branch" in done.err


@pytest.mark.parametrize("step", ["info", "create", "put", "commit", "tag"])
def test_a_hub_that_does_not_answer(
    hub: Hub, exported: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr("gptconvert.push.hub.WAITS", {"connect": 1, "read": 0.1, "write": 1, "pool": 1})
    hub.fail = {step: 0}
    done = command(capsys, "push", exported, REPO, "--tag", "v1")
    assert done.code == 6
    assert f"the hub cannot be reached; found {hub.endpoint}: " in done.err
    assert "timed out" in done.err


def test_nothing_listens(hub: Hub, exported: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = command(capsys, "push", exported, REPO)
    assert done.code == 6
    assert "the hub cannot be reached; found http://127.0.0.1:9: " in done.err


def test_a_token_of_somebody_else(hub: Hub, exported: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    done = command(capsys, "push", exported, REPO)
    assert done.code == 6
    assert "the hub does not accept the token, which may have expired" in done.err
    assert hub.requests == ["info"]
    assert "hf_bad" not in done.err


def test_a_card_that_the_hub_refuses(hub: Hub, exported: Path, capsys: Any) -> None:
    hub.refused = '"license" must be one of [mit, other]'
    done = command(capsys, "push", exported, REPO, "--license", "nonsense")
    assert done.code == 6
    assert "the hub does not accept the model card's front matter" in done.err
    assert '"license" must be one of' in done.err.replace("\\", "")
    assert (hub.requests, hub.repos) == (["info", "validate"], {})


def test_a_tag_that_exists(hub: Hub, exported: Path, capsys: Any) -> None:
    repo = hub.repos[REPO] = Repo()
    repo.refs["refs/tags/v1"] = repo.refs["main"]
    done = command(capsys, "push", exported, REPO, "--tag", "v1")
    assert (done.code, "the repository has a tag v1" in done.err) == (6, True)
    assert hub.requests == ["info", "refs"]


def test_a_hub_that_stores_something_else(hub: Hub, exported: Path, capsys: Any) -> None:
    hub.damage = True
    done = command(capsys, "push", exported, REPO, "--tag", "v1")
    assert done.code == 6
    assert "the hub stores something else for model.safetensors, onnx/model.onnx, onnx/model.onnx_data" in done.err
    assert (hub.requests[-1], hub.repos[REPO].pull_requests) == ("tree", {1: "draft"})


def test_a_gitignore_that_leaves_files_out(hub: Hub, exported: Path, capsys: Any) -> None:
    repo = hub.repos[REPO] = Repo()
    repo.ignored = {"config.json", "onnx/model.onnx"}
    done = command(capsys, "push", exported, REPO)
    assert done.code == 6
    assert "the hub stores something else for config.json, onnx/model.onnx" in done.err


def test_a_file_that_changes_during_the_upload(
    hub: Hub, export: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptconvert.push.hub import HubRepository

    really = HubRepository.ensure_branch

    def changed(self: HubRepository, branch: str) -> None:
        really(self, branch)
        config = export / "config.json"  # of the same size
        config.write_bytes(config.read_bytes().replace(b"gpt2", b"gpt3"))
        append(export / "model.safetensors")

    monkeypatch.setattr(HubRepository, "ensure_branch", changed)
    done = command(capsys, "push", export, REPO, "--branch", "v2")
    assert done.code == 6
    assert "the hub stores something else for config.json, model.safetensors" in done.err


def test_a_reply_that_no_hub_sends(hub: Hub, exported: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.push.hub_server.Handler.on_preupload", lambda *_, **__: {"files": 3}, raising=True)
    done = command(capsys, "push", exported, REPO)
    assert done.code == 6
    assert "uploading: the reply of the hub cannot be used" in done.err


def test_a_failure_of_xet(hub: Hub, exported: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("gptconvert.push.hub.OFFICIAL", hub.endpoint)
    done = command(capsys, "push", exported, REPO)
    assert done.code == 6, done.err
    assert hub.requests[-1] == "xet"
    assert "HF_HUB_DISABLE_XET=1" in done.err


def test_an_interrupt_says_what_is_left(hub: Hub, exported: Path, tmp_path: Path) -> None:
    hub.fail = {"tree": 0}
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-m", "gptconvert", "push", str(exported), REPO]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while "tree" not in hub.requests and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "interrupted; the default branch is unchanged; pull request" in err
    assert "holds 1 of 1 commits; run again with --pr 1 to go on, or close it" in err


def test_a_hub_that_fails_for_a_while(hub: Hub, exported: Path, tmp_path: Path) -> None:
    """In a process of its own, whose libraries are imported as for a user: attempts are repeated without a word."""
    hub.fail, hub.until = {"preupload": 503}, {"preupload": 1}
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
    words = [sys.executable, "-m", "gptconvert", "push", str(exported), REPO, "-q"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.requests.count("preupload") == 2
