"""Uploads to a hub on the loopback: complete, equal, and never half on the default branch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.commands import command, tree
from tests.push.hub_server import Hub, Repo
from tests.reporting.runs import valid

REPO = "org/name"


def push(capsys: Any, directory: Path, *options: object) -> Any:
    """The result of a push that succeeds."""
    done = command(capsys, "push", directory, REPO, "--json", *options)
    assert done.code == 0, done.err
    return valid("push", done.json)


def check_sums(contents: dict[str, bytes]) -> None:
    listed = dict(line.split("  ")[::-1] for line in contents["SHA256SUMS"].decode().splitlines())
    found = {path: hashlib.sha256(data).hexdigest() for path, data in contents.items() if path != "SHA256SUMS"}
    assert found == listed


def test_a_pull_request_to_a_new_repository(hub: Hub, export: Path, capsys: Any) -> None:
    before = tree(export)
    found = push(capsys, export)
    repo = hub.repos[REPO]
    assert (repo.private, repo.pull_requests) == (False, {1: "open"})
    assert repo.contents("main") == {}
    assert repo.contents("refs/pr/1") == before
    assert found["pull_request"] == {"number": 1, "url": f"{hub.endpoint}/{REPO}/discussions/1"}
    assert (found["revision"], found["oid"]) == ("refs/pr/1", repo.refs["refs/pr/1"])
    assert found["commits"] == [{"oid": found["oid"], "url": f"{hub.endpoint}/{REPO}/commit/{found['oid']}"}]
    assert tree(export) == before


def test_a_branch_of_an_existing_repository(hub: Hub, export: Path, capsys: Any) -> None:
    repo = hub.repos[REPO] = Repo()
    head = repo.refs["main"]
    found = push(capsys, export, "--branch", "v2/onnx", "--message", "second version")
    assert (repo.refs["main"], repo.pull_requests) == (head, {})
    assert repo.contents("v2/onnx") == tree(export)
    assert (found["revision"], found["pull_request"]) == ("v2/onnx", None)
    assert repo.titles[found["oid"]] == "second version"


def test_the_result_for_people(hub: Hub, export: Path, capsys: Any) -> None:
    done = command(capsys, "push", export, REPO, "--tag", "v1")
    oid = hub.repos[REPO].refs["refs/tags/v1"]
    assert done.out.splitlines() == [
        f"uploaded to {hub.endpoint}/{REPO}/discussions/1: 10 files, 240.4 kB",
        f"  commit {oid}",
        "  tag    v1",
    ]
    assert "note: the model card names no licence; --license adds one" in done.err
    assert "%|" not in done.err
    assert command(capsys, "push", export, REPO, "--branch", "b", "-q").err == ""


@pytest.mark.parametrize("limit", [("MAX_FILES", 4), ("MAX_BYTES", 100_000)])
def test_several_commits(
    hub: Hub, export: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, limit: tuple[str, int]
) -> None:
    monkeypatch.setattr(f"gptconvert.push.plan.{limit[0]}", limit[1])
    found = push(capsys, export, "--tag", "v1")
    repo, oids = hub.repos[REPO], [each["oid"] for each in found["commits"]]
    assert len(oids) == found["parts"] == 3
    assert repo.titles[oids[1]].endswith(f"(part 2 of {len(oids)})")
    sizes = [len(repo.commits[oid]) for oid in oids]
    assert sizes == sorted({*sizes})
    # Until the last commit, nothing says that the files are complete; the draft is published and tagged after it.
    assert all("SHA256SUMS" not in repo.commits[oid] for oid in oids[:-1])
    assert repo.contents(oids[-1]) == tree(export)
    assert hub.requests[-3:] == ["tree", "status", "tag"]
    assert repo.refs["refs/tags/v1"] == found["oid"] == oids[-1]


def test_only_the_official_hub_is_taken_to_have_xet(
    hub: Hub, export: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    push(capsys, export)
    assert "put" in hub.requests and "xet" not in hub.requests
    assert constants.HF_HUB_DISABLE_XET is False


def test_private(hub: Hub, export: Path, capsys: Any) -> None:
    push(capsys, export, "--private")
    assert hub.repos[REPO].private
    push(capsys, export, "--private", "--branch", "again")
    hub.repos[REPO].private = False
    done = command(capsys, "push", export, REPO, "--private")
    assert done.code == 6
    assert "the repository exists, and is public" in done.err
    assert "nothing was uploaded" in done.err


def test_the_card_is_completed_in_the_upload_only(hub: Hub, export: Path, capsys: Any) -> None:
    before = tree(export)
    found = push(capsys, export, "--license", "mit", "--base-model", "openai-community/gpt2")
    uploaded = hub.repos[REPO].contents("refs/pr/1")
    assert tree(export) == before
    assert {path for path in before if before[path] != uploaded[path]} == {"README.md", "SHA256SUMS"}
    check_sums(uploaded)
    sums = {each["path"]: each["sha256"] for each in found["files"]}
    assert sums == {path: hashlib.sha256(data).hexdigest() for path, data in uploaded.items()}
    metadata = ModelCard(uploaded["README.md"].decode()).data.to_dict()
    assert metadata == found["card"]
    expected = {"license": "mit", "base_model": "openai-community/gpt2", "base_model_relation": "quantized"}
    assert metadata.items() >= {**expected, "library_name": "transformers", "pipeline_tag": "text-generation"}.items()


def test_a_download_is_complete_again(hub: Hub, export: Path, tmp_path: Path, capsys: Any) -> None:
    first = push(capsys, export, "--license", "mit", "--base-model", "org/base")
    for path, data in hub.repos[REPO].contents("refs/pr/1").items():
        (tmp_path / "download" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "download" / path).write_bytes(data)
    again = push(capsys, tmp_path / "download", "--dry-run")
    assert (again["files"], again["card"], again["notes"]) == (first["files"], first["card"], [])


def test_an_edited_card_is_uploaded_as_it_is(hub: Hub, export: Path, capsys: Any) -> None:
    with (export / "README.md").open("a") as file:
        file.write("\nMade by hand.\n")
    found = push(capsys, export)
    uploaded = hub.repos[REPO].contents("refs/pr/1")
    assert uploaded["README.md"] == (export / "README.md").read_bytes()
    check_sums(uploaded)
    assert found["notes"][0] == "README.md was edited after SHA256SUMS was written"


def test_what_the_repository_has_already(hub: Hub, export: Path, capsys: Any) -> None:
    push(capsys, export)
    repo = hub.repos[REPO]
    repo.refs["main"] = repo.refs["refs/pr/1"]
    repo.commits[repo.refs["main"]]["old.onnx"] = repo.commits[repo.refs["main"]]["onnx/model.onnx"]
    hub.requests.clear()
    found = push(capsys, export)
    assert "put" not in hub.requests and "commit" not in hub.requests
    assert found["oid"] == repo.refs["main"]
    assert found["notes"][-1] == "the repository has other files too, which were left as they are: old.onnx"


def test_dry_run_makes_no_request(hub: Hub, export: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    found = push(capsys, export, "--dry-run", "--license", "mit", "--tag", "v1")
    assert found["card"]["license"] == "mit"
    assert {each["path"]: each["size"] for each in found["files"]}.keys() == tree(export).keys()
    assert (found["oid"], found["commits"], found["url"], found["tag"]) == (None, [], None, "v1")
    done = command(capsys, "push", export, REPO, "--dry-run")
    assert f"would upload to {REPO}, pull request, in 1 commit: 10 files, 240.4 kB" in done.out
    assert "  library_name: transformers" in done.out
    assert hub.requests == []


def test_an_upload_that_failed_goes_on(hub: Hub, export: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptconvert.push.plan.MAX_FILES", 4)
    hub.fail, hub.after = {"commit": 500}, {"commit": 1}
    assert command(capsys, "push", export, REPO).code == 6
    repo = hub.repos[REPO]
    assert (repo.pull_requests, len(repo.contents("refs/pr/1"))) == ({1: "draft"}, 4)
    hub.fail = {}
    found = push(capsys, export, "--pr", "1")
    assert (found["revision"], repo.pull_requests) == ("refs/pr/1", {1: "open"})
    assert repo.contents("refs/pr/1") == tree(export)
    repo.pull_requests[1] = "merged"
    done = command(capsys, "push", export, REPO, "--pr", "1")
    assert (done.code, "pull request 1 is merged" in done.err) == (6, True)


def test_a_dry_run_names_the_branch_and_commits(export: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptconvert.push.plan.MAX_FILES", 4)
    done = command(capsys, "push", export, REPO, "--dry-run", "--branch", "v2", "--tag", "v2.0")
    assert f"would upload to {REPO}, branch v2, in 3 commits" in done.out
    assert "tag: v2.0" in done.out


def test_the_page_of_the_web_command_is_not_uploaded(export: Path, capsys: Any) -> None:
    (export / "web").mkdir()
    for name in ("index.html", "web/app.js", "web/SHA256SUMS"):
        (export / name).write_text("")
    found = command(capsys, "push", export, "org/name", "--dry-run", "--json").json
    assert "the page of gptconvert web is not uploaded" in found["notes"]
    assert not [each["path"] for each in found["files"] if each["path"].startswith(("web/", "index"))]
    (export / "web/SHA256SUMS").unlink()
    assert command(capsys, "push", export, "org/name", "--dry-run").code == 3
