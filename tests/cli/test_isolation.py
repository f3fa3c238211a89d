"""No command but hub access uses the network, and none writes anywhere but its output.

Every command runs in its own process with an empty home, cache and temporary directory. An audit hook records the
sockets of each Python process; strace, where it is installed, also those that native libraries open.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, TINY, TRAINED
from tests.sources.hub_server import COMMIT, Hub, serve

pytestmark = pytest.mark.slow

#: Installed as sitecustomize.py: the processes that a command starts report their sockets too.
HOOK = """
import os, sys
log = os.open(os.environ["SOCKET_LOG"], os.O_WRONLY | os.O_APPEND)
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        os.write(log, f"{event} {args[1:]!r}\\n".encode())
sys.addaudithook(hook)
"""
PERSONAL = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR")


@functools.cache
def tracer() -> tuple[str, ...]:
    """The command that traces system calls on sockets; empty where it is missing or forbidden."""
    words = ("strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg,sendmmsg")
    usable = shutil.which("strace") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if usable else ()


class Sandbox:
    """A user's machine, with nothing in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.log, self.trace = root / "user", root / "sockets", root / "trace"
        hooks = root / "hooks"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "HF_", "KERAS_"))},
            **{name: str(self.root / name) for name in PERSONAL},
            "PYTHONPATH": os.pathsep.join(map(str, (hooks, REPOSITORY))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "SOCKET_LOG": str(self.log),
        }
        for folder in (hooks, self.root / "work", *(self.root / name for name in PERSONAL)):
            folder.mkdir(parents=True)
        (hooks / "sitecustomize.py").write_text(HOOK)
        self.log.touch()
        self.trace.touch()

    def run(self, *arguments: object) -> None:
        prefix = (*tracer(), "-o", str(self.trace)) if tracer() else ()
        words = [*prefix, sys.executable, *map(str, arguments)]
        done = subprocess.run(
            words, cwd=self.root / "work", env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr

    def addresses(self) -> set[str]:
        """The IPv4 addresses in :meth:`sockets`."""
        return set(re.findall(r"\d+\.\d+\.\d+\.\d+", "".join(self.sockets())))

    def sockets(self) -> list[str]:
        """Every use of the network. Local sockets, such as those of name services, are not."""
        traced = [line for line in self.trace.read_text(errors="replace").splitlines() if "AF_INET" in line]
        return self.log.read_text().splitlines() + traced

    def files(self) -> list[str]:
        """Every file and directory that was created."""
        kept = {self.root / "work", *(self.root / name for name in PERSONAL)}
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path not in kept)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified export as ONNX and safetensors; what its conversion did is in the sandbox beside it."""
    sandbox = Sandbox(tmp_path_factory.mktemp("export"))
    output = sandbox.root.parent / "out"
    sandbox.run("-m", "gptconvert", "convert", TRAINED, "--to", "onnx,safetensors", "-o", output, "-q")
    assert (sandbox.sockets(), sandbox.files()) == ([], [])
    return output


def test_the_hook_and_the_tracer_see_sockets_and_files(sandbox: Sandbox) -> None:
    code = (
        "import socket, pathlib\n"
        "with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s: s.connect(('127.0.0.1', 9))\n"
        "pathlib.Path.home().joinpath('left').touch()"
    )
    sandbox.run("-c", code)
    assert any("socket.connect" in line for line in sandbox.sockets())
    assert any("connect(" in line for line in sandbox.sockets()) == bool(tracer())
    assert sandbox.files() == ["HOME/left"]


def test_conversion_with_verification(export: Path) -> None:
    """The fixture asserts it; onnxruntime's telemetry did look up names, and wrote into XDG_CACHE_HOME."""
    assert (export / "manifest.json").is_file()


def test_report(sandbox: Sandbox, tmp_path: Path) -> None:
    """matplotlib writes its list of fonts into the cache directory."""
    report = tmp_path / "report.html"
    words = ["--to", "onnx", "-o", tmp_path / "out", "--report", report, "-q"]
    sandbox.run("-m", "gptconvert", "convert", TINY / "openai-tf", *words)
    assert "<svg" in report.read_text()
    assert (sandbox.sockets(), sandbox.files()) == ([], [])


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_generation(export: Path, sandbox: Sandbox, runtime: str) -> None:
    sandbox.run("-m", "gptconvert", "generate", export, "def main", "--runtime", runtime, "--max-new-tokens", "2")
    assert (sandbox.sockets(), sandbox.files()) == ([], [])


def test_offline_verification(export: Path, sandbox: Sandbox) -> None:
    sandbox.run("-m", "gptconvert", "verify", TRAINED, export / "onnx", "--offline", "-q")
    assert (sandbox.sockets(), sandbox.files()) == ([], [])


@pytest.mark.parametrize("words", [["inspect"], ["convert", "--to", "onnx", "--dry-run"]], ids=lambda words: words[0])
def test_reading(sandbox: Sandbox, words: list[str]) -> None:
    sandbox.run("-m", "gptconvert", words[0], TINY / "openai-tf", *words[1:])
    assert (sandbox.sockets(), sandbox.files()) == ([], [])


def test_hub_access(sandbox: Sandbox) -> None:
    """It connects to the endpoint only, and writes into the hub cache only."""
    files = {path.name: path.read_bytes() for path in (TINY / "hf-safetensors").iterdir()}
    with serve(Hub({"org/tiny": {"main": COMMIT}}, {COMMIT: files})) as hub:
        proxies = {name: "" for name in os.environ if "proxy" in name.lower()}
        sandbox.environment |= {"HF_ENDPOINT": hub.endpoint, **proxies}
        sandbox.run("-m", "gptconvert", "inspect", "org/tiny", "--cache-dir", sandbox.root / "work" / "cache")
    assert sandbox.addresses() == {"127.0.0.1"}
    assert [request for request in hub.requests if "org/tiny" not in request] == []
    assert {name for name in sandbox.files() if not name.startswith("work/cache/")} == {"work/cache"}


@pytest.mark.tensorflow
def test_tensorflow(sandbox: Sandbox, tmp_path: Path) -> None:
    """Keras writes its settings into the home directory, and AutoGraph its code into the temporary directory."""
    output = tmp_path / "out"
    sandbox.run("-m", "gptconvert", "convert", TINY / "openai-tf", "--to", "tf", "-o", output, "-q")
    assert (output / "saved_model" / "saved_model.pb").is_file()
    assert (sandbox.sockets(), sandbox.files()) == ([], [])


@pytest.mark.parametrize("name", ["ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"])
def test_a_users_choice_about_telemetry_stands(sandbox: Sandbox, name: str) -> None:
    sandbox.environment[name] = "0"
    sandbox.run("-c", f"import os, gptconvert; assert os.environ[{name!r}] == '0'")
