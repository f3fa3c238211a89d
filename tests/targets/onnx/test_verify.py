"""How one ONNX file is verified: whose weights run, what happens at the same time, and what a failure leaves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.options import Options
from gptconvert.model.transforms import cast, transpose
from gptconvert.publish.source_reader import StoppedError
from gptconvert.targets.onnx.file import open_onnx
from gptconvert.targets.onnx.foreign import pair_up
from gptconvert.targets.onnx.runner import OnnxRunner, bind
from gptconvert.targets.onnx.verify import DEFAULT, IN_PLACE, LENT, OnnxVerifier, Runs
from gptconvert.verify.probes import make_probes
from gptconvert.verify.run_probes import feeds_of
from gptconvert.verify.weights import Pair, compare, in_one_piece
from tests.helpers import checkpoint_of, computed_tensors, tiny_gpt2
from tests.verify.exports import export, report_on, tiny


class Spy(OnnxRunner):
    """Records the names of the weights lent to each session."""

    lent: ClassVar[list[set[str]]] = []

    def __init__(self, *arguments: Any, lent: Any = None, **fields: Any) -> None:
        self.lent.append(set(lent or ()))
        super().__init__(*arguments, lent=lent, **fields)


def spied(checkpoint: Checkpoint, path: Path, **fields: Any) -> tuple[list[str], list[set[str]]]:
    """The runtimes that a graph passed, and what was lent to each."""
    Spy.lent.clear()
    report = report_on(checkpoint, path, verifiers={"onnx": OnnxVerifier(runner=Spy, **fields)})
    assert report.passed
    return [run.runtime for run in report.artifacts[0].runs], list(Spy.lent)


def test_a_small_model_runs_with_the_weights_in_its_file(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    assert spied(checkpoint, export(tmp_path, checkpoint)) == ([DEFAULT], [set()])


def test_a_large_model_runs_with_the_sources(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    assert spied(checkpoint, export(tmp_path, checkpoint), small_model=0) == ([LENT], [set(checkpoint.weights)])


def test_a_foreign_file_runs_with_its_own(tmp_path: Path) -> None:
    from tests.verify.exports import edit
    from tests.verify.test_families import disown

    checkpoint = tiny(tmp_path)
    path = export(tmp_path, checkpoint)
    edit(path, disown)
    assert spied(checkpoint, path, small_model=0) == ([IN_PLACE], [set()])


def test_what_can_be_lent(tmp_path: Path) -> None:
    """Bytes in one run, aligned, of the file's own shape and type."""
    checkpoint = tiny(tmp_path)
    file = open_onnx(str(export(tmp_path, checkpoint)))
    _, pairs = pair_up(file, checkpoint.weights)
    by_name = {pair.name: (pair.expected, pair.found) for pair in pairs}
    assert set(in_one_piece(pairs)) == set(checkpoint.weights)
    expected, found = by_name["h.0.mlp.c_fc.weight"]
    for other in (transpose(expected), cast(expected, BFLOAT16), computed_tensors({"x": expected.read()})["x"]):
        assert in_one_piece([Pair("w", "w", other, found)]) == {}
    odd = tiny(tmp_path / "odd", start=1)
    _, pairs = pair_up(open_onnx(str(export(tmp_path / "odd", odd))), odd.weights)
    assert len(pairs) == len(odd.weights) and in_one_piece(pairs) == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
def test_a_session_uses_what_it_is_lent(tmp_path: Path, dtype: Any) -> None:
    """Two exports with other weights: each graph computes what the lender's does, bit for bit."""
    runs = []
    for seed in (1, 2):
        checkpoint = tiny(tmp_path / str(seed), seed, dtype=dtype)
        file = open_onnx(str(export(tmp_path / str(seed), checkpoint)))
        runs.append((checkpoint, file, bind(file, checkpoint.config)))
    (first, first_file, binding), (second, second_file, _) = runs
    feeds = feeds_of(make_probes(first.config, kv_cache=True)[2], first.config)
    _, pairs = pair_up(second_file, second.weights)
    honest = [OnnxRunner(f, binding, c.config).run(feeds, True).named["logits"] for c, f, _ in runs]
    lent = OnnxRunner(first_file, binding, first.config, lent=in_one_piece(pairs)).run(feeds, True).named["logits"]
    assert np.array_equal(lent, honest[1]) and not np.array_equal(*honest)


def test_weights_are_compared_while_the_graph_runs(tmp_path: Path) -> None:
    """The comparison here ends only when the first run has begun."""
    running = threading.Event()

    def waiting(*arguments: Any, **fields: Any) -> Any:
        assert running.wait(60)
        return compare(*arguments, **fields)

    class Starting(OnnxRunner):
        def run(self, feeds: Any, presents: bool) -> Any:
            running.set()
            return super().run(feeds, presents)

    checkpoint = tiny(tmp_path)
    verifier = OnnxVerifier(runner=Starting, compare=waiting)
    report = report_on(checkpoint, export(tmp_path, checkpoint), verifiers={"onnx": verifier})
    assert report.passed and report.artifacts[0].weights.equal == len(checkpoint.weights)


@pytest.mark.parametrize("most", [0, 1 << 30], ids=["large", "small"])
def test_runs_with_wrong_weights_do_not_count(tmp_path: Path, most: int) -> None:
    """With the right weights lent to it the graph is right; what is in the file is not."""
    checkpoint = tiny(tmp_path)
    data = export(tmp_path, checkpoint).with_name("model.onnx_data")
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    report = report_on(checkpoint, tmp_path, verifiers={"onnx": OnnxVerifier(small_model=most)})
    assert not report.passed and not report.artifacts[0].runs
    assert "differs from its source" in report.table() and "outputs: not run" in report.table()


def test_a_comparison_that_cannot_be_made_does_not_pass(tmp_path: Path) -> None:
    def unreadable(report: Any, pairs: Any, stop: Any) -> Any:
        raise InputError("cannot be read (Input/output error)")

    checkpoint = tiny(tmp_path)
    with pytest.raises(InputError, match="Input/output error"):
        report_on(checkpoint, export(tmp_path, checkpoint), verifiers={"onnx": OnnxVerifier(compare=unreadable)})


class Halt(Exception):
    pass


class Halting(OnnxRunner):
    def run(self, feeds: Any, presents: bool) -> Any:
        raise Halt


def test_a_failing_run_ends_comparison_and_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: dict[str, BaseException] = {}

    def endless(name: str, stop: threading.Event) -> Any:
        assert stop.wait(60)
        ended[name] = StoppedError()
        raise StoppedError

    monkeypatch.setattr(Runs, "_truth", lambda self, wave, stop, alone: endless("truth", stop))
    checkpoint = tiny(tmp_path)
    verifier = OnnxVerifier(runner=Halting, compare=lambda report, pairs, stop: endless("comparison", stop))
    with pytest.raises(Halt):
        report_on(checkpoint, export(tmp_path, checkpoint), verifiers={"onnx": verifier})
    assert set(ended) == {"comparison", "truth"}


def test_the_truth_stops_between_two_blocks(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    file = open_onnx(str(export(tmp_path, checkpoint)))
    runs = Runs(file, checkpoint, {}, "default", lambda name, total: lambda count: None)
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        runs._truth(runs.probes, stop, threading.Event())


def test_threads_of_torch_are_as_before(tmp_path: Path) -> None:
    import torch

    checkpoint, before = tiny(tmp_path), torch.get_num_threads()
    assert report_on(checkpoint, export(tmp_path, checkpoint)).passed
    assert torch.get_num_threads() == before


def test_a_checkpoint_of_nan_is_the_checkpoints_fault(tmp_path: Path) -> None:
    """Told by the truth, in its thread, while the graph runs."""
    raw, arrays = tiny_gpt2()
    arrays["transformer.h.1.mlp.c_fc.bias"][3] = np.nan
    checkpoint = checkpoint_of(raw, arrays, tmp_path, request=Options())
    with pytest.raises(InputError, match="checkpoint itself computes NaN"):
        report_on(checkpoint, export(tmp_path, checkpoint))
