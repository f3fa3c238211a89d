"""The runner uses weights of any type in place and keeps no unrequested keys and values."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.transforms import cast
from gptconvert.targets.onnx.file import open_onnx
from gptconvert.targets.onnx.runner import OnnxRunner, bind
from gptconvert.verify.probes import make_probes
from gptconvert.verify.run_probes import feeds_of
from tests.verify.exports import export, tiny

MIB = 1 << 20


def anonymous() -> int:
    """Bytes of this process that are not backed by a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@contextmanager
def sampled() -> Iterator[list[int]]:
    """Samples of :func:`anonymous`, every half millisecond."""
    seen, stop = [anonymous()], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_half_precision_weights_are_widened_one_at_a_time(tmp_path: Path, dtype: np.dtype[np.generic]) -> None:
    """Twenty layers take 3 MiB each in float32; neither loading nor running may hold half of that."""
    wide = tiny(tmp_path, n_embd=240, n_head=3, n_inner=960, n_layer=20)
    narrow = dataclasses.replace(wide, weights={name: cast(w, dtype) for name, w in wide.weights.items()})
    file = open_onnx(str(export(tmp_path, narrow)), confined=False)
    binding, probe = bind(file, narrow.config), make_probes(narrow.config, kv_cache=True)[0]
    feeds = feeds_of(probe, narrow.config)
    first = OnnxRunner(file, binding, narrow.config)  # kept alive, so that its memory is not reused
    first.run(feeds, True)
    with sampled() as seen:
        runner = OnnxRunner(file, binding, narrow.config)
        for _ in range(30):
            runner.run(feeds, True)
    assert max(seen) - seen[0] < 30 * MIB


def test_long_past_is_returned_only_on_request(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    file = open_onnx(str(export(tmp_path, checkpoint)), confined=False)
    binding = bind(file, checkpoint.config)
    probe = next(p for p in make_probes(checkpoint.config, kv_cache=True) if p.shared_past)
    feeds, answers = feeds_of(probe, checkpoint.config), []
    for most, returned in ((1 << 40, None), (0, ["logits"])):
        runner = OnnxRunner(file, binding, checkpoint.config, most_cache=most)
        answers.append(runner.run(feeds, False))
        session = runner._without_cache
        assert returned == (session and [output.name for output in session.get_outputs()])
        assert len(runner.run(feeds, True).presents) == 2
    assert all(not answer.presents for answer in answers)
    assert np.array_equal(answers[0].named["logits"], answers[1].named["logits"])
