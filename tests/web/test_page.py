"""The page of exports in headless Chromium, with the network cut: it writes what ``gptconvert generate`` writes.

Screenshots go to the directory in ``GPTCONVERT_SCREENSHOTS``, if it is set.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptconvert.web
from gptconvert.generation.model import generate
from gptconvert.generation.sampling import Sampling
from gptconvert.model.options import Options
from gptconvert.pipeline import convert, open_checkpoint
from gptconvert.web.libraries import FOLDER, libraries, packages
from gptconvert.web.publish import publish
from gptconvert.web.server import Server
from tests.commands import TRAINED
from tests.targets.package.test_tokenizer_word_end import gpt1
from tests.targets.package.word_end import write_pair

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "Objects are"
SIZES = [1280, 390]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("node") and MODULES.is_dir()), reason="no Node or npm packages: make test-web"
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    server = Server(str(directory), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with all graphs, verified, and a page that needs no network."""
    directory = tmp_path_factory.mktemp("page") / "out"
    options = Options(targets=("onnx",), quantize=("q8", "q4"))
    convert(open_checkpoint(str(TRAINED)), str(directory), options)
    publish(str(directory), str(MODULES))
    return directory


@pytest.fixture(scope="module")
def url(export: Path) -> Iterator[str]:
    with serving(export) as found:
        yield found


def browse(*steps: dict[str, Any], shots: Path | None = None) -> list[dict[str, Any]]:
    """What ``page.mjs`` sees; nothing but the server was asked, and nothing failed unseen."""
    arguments = ["node", "page.mjs", str(CHROMIUM), str(shots or HERE), json.dumps(steps)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=540, cwd=HERE, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert not [each["failed"] for each in found if "failed" in each]
    for each in found:
        assert (each.pop("outside"), each.pop("problems")) == ([], [])
    return found


def greedy(directory: Path, prompt: str, length: int, variant: str) -> str:
    return prompt + generate(str(directory), prompt, Sampling(max_new_tokens=length), variant=variant).text


def test_pinned_libraries_are_those_of_the_tests() -> None:
    for name, version in packages().items():
        assert json.loads((MODULES / name / "package.json").read_text())["version"] == version
    for roles in libraries().values():
        for each in roles.values():
            assert (MODULES / each.path).stat().st_size == each.size


def test_libraries_are_copied_with_their_licences(export: Path) -> None:
    for roles in libraries().values():
        for each in roles.values():
            assert (export / FOLDER / each.name).read_bytes() == (MODULES / each.path).read_bytes()
    licences = {path.name: path.read_text() for path in (export / FOLDER).glob("LICENSE-*")}
    assert "Apache License" in licences.pop("LICENSE-tokenizers.txt")
    assert "Microsoft" in licences.pop("LICENSE-onnxruntime-web.txt")
    assert not licences


def test_greedy_text_of_every_variant(export: Path, url: str) -> None:
    cases = [("q8", 40), ("q4", 40), ("fp32", 40)]
    steps = [{"do": "greedy", "url": url, "prompt": PROMPT, "length": n, "variant": v} for v, n in cases]
    for (variant, length), found in zip(cases, browse(*steps), strict=True):
        assert found == {"text": greedy(export, PROMPT, length, variant), "isolated": True}


def test_webgpu(export: Path, url: str) -> None:
    """In software, which is slow."""
    cases = [("q8", 6), ("fp32", 6)]
    steps = [
        {"do": "greedy", "url": url, "prompt": PROMPT, "length": n, "variant": v, "device": "webgpu"}
        for v, n in cases
    ]
    for (variant, length), found in zip(cases, browse(*steps), strict=True):
        assert found["text"] == greedy(export, PROMPT, length, variant)


def test_alternatives(export: Path, url: str) -> None:
    (found,) = browse({"do": "alternatives", "url": url, "prompt": PROMPT, "length": 6, "variant": "fp32"})
    first, second, third = (PROMPT + each for each in found["offered"])
    assert first == greedy(export, PROMPT, 6, "fp32")
    assert len({first, second, third}) == 3
    taken = [part for text in (second, third, first) for part in (text, "text", PROMPT)]  # then taken back
    assert found["chosen"] == [*taken, third]


def test_stop(export: Path, url: str) -> None:
    (found,) = browse({"do": "stop", "url": url, "prompt": PROMPT, "length": 120})
    whole = greedy(export, PROMPT, 120, "q8")
    assert whole.startswith(found["text"]) and len(PROMPT) < len(found["text"]) < len(whole)


def test_a_seed_repeats_its_texts(url: str) -> None:
    (found,) = browse({"do": "seeds", "url": url, "prompt": "The", "seeds": [1, 1, 2]})
    first, again, other = found["texts"]
    assert first == again != other


def test_details(url: str) -> None:
    (found,) = browse({"do": "details", "url": url, "prompt": PROMPT, "length": 8})
    assert PROMPT + "".join(found["before"]) == found["whole"]
    assert found["moved"] == found["before"] and len(found["before"]) == 8  # an edit before them moves them
    assert "Point at a shaded token" in found["none"]
    token = found["before"][0].replace(" ", "·")
    assert f"{token} had a probability of {found['rows'][0][1]}" in found["keyboard"]
    assert len(found["rows"]) == 5 and found["rows"][0][0] == token
    chances = [0.0 if "below" in text else float(text.partition(" ")[0]) for _, text in found["rows"]]
    assert chances == sorted(chances, reverse=True) and 50 < sum(chances) <= 100.5
    assert f"{found['before'][-1]} had a probability" in found["pointer"]
    assert "256 tokens" in found["model"] and "ms" in found["model"]
    assert found["speed"].endswith("tokens per second")
    assert "q8 was verified before it was published: all 52 weights" in found["proof"]
    assert "less than 0.01 nats" in found["proof"]


def test_long_and_empty_texts(url: str) -> None:
    (found,) = browse({"do": "extremes", "url": url, "word": "object ", "count": 400})
    assert found == {
        "long": "The text is longer than the context: the model read its last 252 tokens.",
        "grown": True,
    }


def test_looks(url: str, tmp_path: Path) -> None:
    """Nothing is wider than a phone, every control has a name, and the pictures are taken."""
    shots = Path(os.environ.get("GPTCONVERT_SCREENSHOTS") or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    steps = [
        {"do": "look", "url": url, "prompt": PROMPT, "name": f"page-{scheme}", "sizes": SIZES, "scheme": scheme}
        for scheme in ("light", "dark")
    ]
    for found in browse(*steps, shots=shots):
        assert found == {"wide": [], "unnamed": []}
    for scheme in ("light", "dark"):
        for size in SIZES:
            assert (shots / f"page-{scheme}-{size}.png").stat().st_size > 10_000


BROKEN = [
    ("model_quantized.onnx", 404, "model_quantized.onnx cannot be loaded (status 404)"),
    ("model_quantized.onnx", 200, "model_quantized.onnx is not the file this page was made for"),
    ("tokenizer.json", 404, "tokenizer.json cannot be loaded"),
    ("ort.wasm.min.mjs", 200, "or is not the file this page was made for"),
]


def test_broken_files(url: str) -> None:
    steps = [{"do": "broken", "url": url, "open": url, "file": f, "status": s, "body": "no"} for f, s, _ in BROKEN]
    for (file, status, message), found in zip(BROKEN, browse(*steps), strict=True):
        assert message in found["message"] and not found["canWrite"], (file, status)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("WebAssembly.validate = () => false", "This browser has no WebAssembly SIMD"),
        (
            "self.fetch = () => { throw new RangeError('Array buffer allocation failed'); }",
            "There is not enough memory for this model",
        ),
    ],
)
def test_lesser_browsers(url: str, statement: str, message: str) -> None:
    (found,) = browse({"do": "lesser", "url": url, "open": url, "statement": statement})
    assert found["message"].startswith(message) and not found["canWrite"]


def test_a_page_that_needs_the_network(tmp_path: Path) -> None:
    """Without copies of the libraries, it says what is missing."""
    options = Options(targets=("onnx",), verify=None)
    convert(open_checkpoint(str(TRAINED)), str(tmp_path / "out"), options)
    publish(str(tmp_path / "out"))
    with serving(tmp_path / "out") as url:
        arguments = ["node", "page.mjs", str(CHROMIUM), str(tmp_path)]
        step = {"do": "broken", "url": url, "open": url, "file": "none", "status": 404, "body": ""}
        done = subprocess.run(
            [*arguments, json.dumps([step])], capture_output=True, text=True, timeout=200, cwd=HERE, check=True
        )
    (found,) = json.loads(done.stdout)
    assert "gptconvert web --runtime-from" in found["message"]
    assert found["outside"] and all(each.startswith("https://cdn.jsdelivr.net/npm/") for each in found["outside"])


def test_gpt1(tmp_path: Path) -> None:
    """GPT-1 has a tokenizer of its own, and no end token."""
    (tmp_path / "source").mkdir()
    checkpoint = gpt1(write_pair(tmp_path), directory=tmp_path / "source")
    convert(checkpoint, str(tmp_path / "out"), Options(targets=("onnx",), verify=None))
    publish(str(tmp_path / "out"), str(MODULES))
    prompt = "the thing is"
    with serving(tmp_path / "out") as url:
        (found,) = browse({"do": "greedy", "url": url, "prompt": prompt, "length": 12, "variant": "fp32"})
    assert found["text"] == greedy(tmp_path / "out", prompt, 12, "fp32")


@pytest.mark.parametrize("single_file", [True, False])
@pytest.mark.parametrize("block_size", [32, 128])
def test_unpacked_graphs_compute_the_same(single_file: bool, block_size: int, tmp_path: Path) -> None:
    """Rows of 144 weights end within a block; the matrix of the head shares its codes with the embedding."""
    options = Options(
        targets=("onnx",), quantize=("q8", "q4"), block_size=block_size, single_file=single_file, verify=None
    )
    convert(open_checkpoint(str(TRAINED)), str(tmp_path / "out"), options)
    module = Path(gptconvert.web.__file__).parent / "assets" / "unpack.js"
    arguments = ["node", "unpack.mjs", str(tmp_path / "out/onnx"), str(module), json.dumps(list(range(3, 40)))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200, cwd=HERE, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: each["packed"] for name, each in found.items()} == dict.fromkeys(found, False) and len(found) == 3
    assert all(each["limited"] for each in found.values())
    for name, each in found.items():
        before, after = np.array(each["asItIs"]), np.array(each["unpacked"])
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max(), err_msg=name)
