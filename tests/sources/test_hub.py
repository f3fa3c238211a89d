"""The hub, tested with a server on the loopback that speaks its protocol.

huggingface_hub reads ``HF_ENDPOINT`` when it is imported, so each client runs in its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.sources.hub import is_repo_id
from tests.helpers import FIXTURES, ROOT
from tests.sources.hub_server import COMMIT, OLDER, Hub, serve

pytestmark = pytest.mark.slow

REPO = "org/tiny"
SINGLE = FIXTURES / "tiny-gpt2" / "hf-safetensors"
SHARDED = FIXTURES / "tiny-gpt2" / "hf-safetensors-sharded"
CLIENT = """
import json, sys
from gptconvert.errors import GptConvertError
from gptconvert.sources.detect import open_source
from gptconvert.model.options import Options
try:
    source = open_source(sys.argv[1], Options(**json.loads(sys.argv[2])), sys.argv[3] or None)
    first = next(iter(source.tensors.values()))
    print(json.dumps({
        "revision": source.revision, "repo": source.repo, "format": source.format, "notes": source.notes,
        "adapter": source.adapter and [source.adapter.repo, source.adapter.revision],
        "names": sorted(source.tensors), "tokenizer": sorted(source.tokenizer), "files": list(source.files),
        "config": dict(source.config), "sum": float(first.read().sum()),
    }))
except GptConvertError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error), "hint": error.hint}))
"""


def directory_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """One repository with two commits, including files that a conversion does not need."""
    files = directory_files(SINGLE) | {
        "merges.txt": b"#version: 0.2\n",
        "pytorch_model.bin": b"not needed" * 99,
        "onnx/model.onnx": b"not needed",
        "README.md": b"# tiny",
    }
    older = {name: content for name, content in files.items() if name != "merges.txt"}
    with serve(Hub({REPO: {"main": COMMIT, "v1": OLDER}}, {COMMIT: files, OLDER: older})) as running:
        yield running


@dataclass
class Client:
    """A simulated user: one cache, and an environment without the real user's settings."""

    home: Path
    endpoint: str
    token: str | None = None
    offline: bool = False

    def open(self, repo: str = REPO, format: str = "", **options: object) -> dict[str, Any]:
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        env = {**inherited, "HF_HOME": str(self.home), "HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"HF_TOKEN": self.token} if self.token else {}
        env |= {"HF_HUB_OFFLINE": "1"} if self.offline else {}
        command = [sys.executable, "-c", CLIENT, repo, json.dumps(options), format]
        env["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            command, env=env, cwd=self.home, capture_output=True, text=True, check=False, timeout=100
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "%|" not in done.stderr, "a progress bar was written to a pipe"
        return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture
def client(tmp_path: Path, hub: Hub) -> Client:
    return Client(tmp_path, hub.endpoint)


def test_first_run_downloads_what_is_needed_and_pins_the_commit(hub: Hub, client: Client) -> None:
    from safetensors.numpy import load_file

    found = client.open()
    assert found["names"] == sorted(load_file(SINGLE / "model.safetensors"))
    assert (found["revision"], found["repo"]) == (COMMIT, REPO)
    assert found["config"] == json.loads((SINGLE / "config.json").read_text())
    assert found["tokenizer"] == ["merges.txt"]
    assert sorted(hub.downloads()) == ["README.md", "config.json", "merges.txt", "model.safetensors"]
    assert all(file.startswith(str(client.home)) and COMMIT in file for file in found["files"])
    assert found["revision"] == COMMIT
    assert not any(COMMIT in note for note in found["notes"])  # --strict must accept a hub repository
    assert any("pytorch_model.bin" in note for note in found["notes"])


def test_second_run_downloads_nothing_and_offline_sends_no_request(hub: Hub, client: Client) -> None:
    first = client.open()
    hub.requests.clear()
    second = client.open()
    assert second == first
    assert hub.downloads() == []
    hub.requests.clear()
    for found in (client.open(offline=True), Client(client.home, hub.endpoint, offline=True).open()):
        assert found["names"] == first["names"]
        assert found["revision"] == COMMIT
    assert hub.requests == []


def test_a_moved_branch_is_followed_and_the_old_commit_stays_cached(hub: Hub, client: Client) -> None:
    client.open()
    hub.repos[REPO]["main"] = OLDER
    assert client.open()["revision"] == OLDER
    assert client.open(offline=True)["revision"] == OLDER
    assert client.open(revision=COMMIT, offline=True)["revision"] == COMMIT


@pytest.mark.parametrize("revision", ["v1", OLDER])
def test_revision(hub: Hub, client: Client, revision: str) -> None:
    found = client.open(revision=revision)
    assert found["revision"] == OLDER
    assert found["tokenizer"] == []
    assert client.open(revision=revision, offline=True)["revision"] == OLDER


def test_sharded(hub: Hub, client: Client) -> None:
    hub.files[COMMIT] = directory_files(SHARDED)
    found = client.open()
    assert found["format"] == "Hugging Face, safetensors, sharded (hub)"
    assert sum(name.endswith(".safetensors") for name in hub.downloads()) == 4
    assert len(found["names"]) == 28


def test_shard_missing_from_the_repository(hub: Hub, client: Client) -> None:
    files = directory_files(SHARDED)
    hub.files[COMMIT] = {name: files[name] for name in files if "00003" not in name}
    found = client.open()
    assert found["error"] == "InputError"
    assert "1 of 4 shards are missing from the repository: model-00003-of-00004.safetensors" in found["text"]
    assert not any(name.endswith(".safetensors") for name in hub.downloads())


def test_weights_file(hub: Hub, client: Client) -> None:
    hub.files[COMMIT]["pytorch_model.bin"] = (FIXTURES / "tiny-gpt2" / "hf-bin" / "pytorch_model.bin").read_bytes()
    assert client.open(weights_file="pytorch_model.bin")["format"] == "Hugging Face, PyTorch (hub)"
    assert "model.safetensors" not in hub.downloads()


def test_only_other_weights(hub: Hub, client: Client) -> None:
    hub.files[COMMIT] = {"config.json": b"{}", "rust_model.ot": b"x"}
    found = client.open()
    assert found["error"] == "UnsupportedError"
    assert "rust_model.ot" in found["text"]
    assert hub.downloads() == []


def test_no_config(hub: Hub, client: Client) -> None:
    del hub.files[COMMIT]["config.json"]
    assert "config.json is missing" in client.open()["text"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_59_content_that_does_not_match_its_digest(hub: Hub, client: Client, name: str) -> None:
    """The length is right, so huggingface_hub accepts the file. It must not stay in the cache."""
    good = hub.files[COMMIT][name]
    hub.lies[name] = good[:-2] + bytes([good[-2] ^ 1]) + good[-1:]
    for _ in range(2):
        found = client.open()
        assert found["error"] == "InputError"
        assert "damaged" in found["text"]
        assert name in found["text"]
    hub.lies.clear()
    assert client.open()["revision"] == COMMIT


def test_59_no_such_repository(client: Client) -> None:
    found = client.open("org/absent")
    assert found["error"] == "InputError"
    assert "no such repository, or it is private; found HTTP 401" in found["text"]
    assert "org/absent: no such file or directory, and as a hub repository: " in found["text"]
    client.token = "other"
    found = client.open("org/absent")
    assert "no such repository on the hub; found HTTP 404" in found["text"]


def test_59_private_repository_needs_a_token_from_the_environment(hub: Hub, client: Client) -> None:
    hub.private.add(REPO)
    found = client.open()
    assert found["error"] == "InputError"
    assert "HF_TOKEN" in found["hint"]
    client.token = "good"
    assert client.open()["revision"] == COMMIT


def test_59_gated_repository(hub: Hub, client: Client) -> None:
    hub.gated.add(REPO)
    found = client.open()
    assert found["error"] == "InputError"
    assert f"{hub.endpoint}/{REPO}" in found["hint"]


def test_59_no_such_revision(client: Client) -> None:
    found = client.open(revision="v9")
    assert "no revision 'v9'" in found["text"]


@pytest.mark.parametrize("status", [403, 500, 503])
def test_59_server_errors(hub: Hub, client: Client, status: int) -> None:
    hub.status = status
    found = client.open()
    assert found["error"] == "InputError"
    assert f"HTTP {status}" in found["text"]


def test_59_offline_without_a_copy(hub: Hub, client: Client) -> None:
    for found in (client.open(offline=True), Client(client.home, hub.endpoint, offline=True).open()):
        assert found["error"] == "InputError"
        assert "not in the local cache" in found["text"]
        assert "--offline" in found["hint"]
    assert hub.requests == []


def test_59_offline_with_a_partial_copy(hub: Hub, client: Client) -> None:
    client.open()
    for path in client.home.rglob("model.safetensors"):
        path.unlink()
    found = client.open(offline=True)
    assert found["error"] == "InputError"
    assert "without --offline" in found["hint"]


def test_59_no_server(tmp_path: Path) -> None:
    found = Client(tmp_path, "http://127.0.0.1:9").open()
    assert found["error"] == "InputError"
    assert "no such file or directory, and as a hub repository: the hub cannot be reached" in found["text"]


def test_mistyped_path_suggests_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "distilgpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = Client(tmp_path, "http://127.0.0.1:9").open("models/distillgpt2")
    assert "no such file or directory" in found["text"]
    assert found["hint"].startswith("did you mean models/distilgpt2?")


def test_cache_dir(hub: Hub, client: Client, tmp_path: Path) -> None:
    found = client.open(cache_dir=str(tmp_path / "elsewhere"))
    assert all(str(tmp_path / "elsewhere") in file for file in found["files"])
    assert client.open(cache_dir=str(tmp_path / "elsewhere"), offline=True)["revision"] == COMMIT


def test_local_directory_wins(hub: Hub, client: Client) -> None:
    import shutil

    shutil.copytree(SINGLE, client.home / REPO)
    assert client.open()["repo"] is None
    assert hub.requests == []


def test_format_can_be_named(hub: Hub, client: Client) -> None:
    assert client.open(format="hf")["revision"] == COMMIT


LORA = "org/lora"
OF_LORA = "3" * 40


@pytest.fixture
def lora(hub: Hub, tmp_path: Path) -> dict[str, bytes]:
    """A repository with an adapter, as PEFT's users upload it; returns its files."""
    from safetensors.numpy import save

    module = "base_model.model.transformer.h.0.mlp.c_fc"
    factors = {"lora_A": np.ones((2, 24), np.float32), "lora_B": np.ones((56, 2), np.float32)}
    settings = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": REPO}
    files = {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": save({f"{module}.{name}.weight": f for name, f in factors.items()}),
        "tokenizer.json": b"{}",
        "training_args.bin": b"not needed",
    }
    hub.repos[LORA], hub.files[OF_LORA] = {"main": OF_LORA}, files
    return files


def test_adapter_repository(hub: Hub, lora: dict[str, bytes], client: Client) -> None:
    found = client.open(adapter=LORA)
    assert (found["repo"], found["revision"]) == (REPO, COMMIT)
    assert found["adapter"] == [LORA, OF_LORA]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {Path(file).name for file in found["files"]}
    assert found["tokenizer"] == ["tokenizer.json"]
    assert "training_args.bin" not in hub.downloads()
    hub.requests.clear()
    offline = client.open(adapter=LORA, offline=True)
    assert offline["files"] == found["files"]
    assert offline["adapter"] == [LORA, OF_LORA]
    assert hub.requests == []


def test_adapter_repository_without_its_base(hub: Hub, lora: dict[str, bytes], client: Client) -> None:
    found = client.open(LORA)
    assert "LoRA adapter" in found["text"]
    assert f"--base {REPO}" in found["hint"]
    assert hub.downloads() == ["adapter_config.json"]
    lora["config.json"] = b"{}"
    assert "LoRA adapter" in client.open(LORA)["text"]


def test_repository_without_an_adapter(client: Client) -> None:
    assert "no LoRA adapter in the repository" in client.open(adapter=REPO)["text"]


def test_adapter_in_the_repository_of_a_model(hub: Hub, lora: dict[str, bytes], client: Client) -> None:
    hub.files[COMMIT] |= {name: lora[name] for name in lora if name.startswith("adapter")}
    assert sum("left behind: the LoRA adapter" in note for note in client.open()["notes"]) == 1
    merged = client.open(adapter=REPO)
    assert not any("left behind" in note for note in merged["notes"])
    assert "with a LoRA adapter" in merged["format"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", True),
        ("openai-community/gpt2", True),
        ("EleutherAI/gpt-j-6b", True),
        ("a/b/c", False),
        ("./gpt2", False),
        ("/gpt2", False),
        ("../gpt2", False),
        ("org/", False),
        ("org/name/", False),
        ("", False),
        ("my model", False),
        ("model.safetensors", False),
        ("models/model.ckpt", False),
        ("a..b", False),
        ("x" * 200, False),
        ("org/na\nme", False),
    ],
)
def test_repository_names(text: str, expected: bool) -> None:
    assert is_repo_id(text) is expected
