"""Running probes whole and in chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gptconvert.verify.probes import make_probes
from gptconvert.verify.run_probes import run_probes
from gptconvert.verify.runners import Feeds, Outputs, RunError
from tests.verify.exports import tiny


class Misshapen:
    """A candidate whose outputs depend on the number of tokens in more than one axis."""

    kv_cache, free_positions, compute = True, True, "float32"

    def run(self, feeds: Feeds, presents: bool) -> Outputs:
        batch, new = feeds.input_ids.shape
        cache = tuple((np.zeros((batch, 3, new, 8), np.float32),) * 2 for _ in range(2))
        return Outputs({"logits": np.zeros((batch, new, 97 + new), np.float32)}, cache)


def test_chunks_of_different_shapes_are_a_failed_run(tmp_path: Path) -> None:
    """Not an exception: verification must name the probe."""
    config = tiny(tmp_path).config
    results = run_probes(Misshapen(), make_probes(config, kv_cache=True), config)
    (chunked,) = (answer for (_, in_chunks), answer in results.items() if in_chunks)
    assert isinstance(chunked, RunError)
    assert "do not fit together" in str(chunked)
