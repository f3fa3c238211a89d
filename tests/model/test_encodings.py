"""Which weights of a quantised model get how many bits, in blocks of which size."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptconvert.model.blocks import BlockFormat, Quantised
from gptconvert.model.encodings import QUANTISED, quantised
from gptconvert.model.options import Options
from gptconvert.targets.onnx.plan import plan
from gptconvert.targets.verification import verify_exports
from tests.helpers import checkpoint_of, tiny_gpt2, write_planned

SIZES = {"n_embd": 96, "n_inner": 128, "n_head": 3, "n_layer": 2}


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("name", ["q8", "q4", "q4:plain"])
def test_matrices_of_more_bits_have_wider_blocks(name: str, block: int) -> None:
    """Up to four times as wide, in a 4-bit graph, where no row needs padding (96 is not a multiple of 64)."""
    weights = quantised(checkpoint_of(*tiny_gpt2(**SIZES)), QUANTISED[name], block).weights
    found = {key: weight.format for key, weight in weights.items() if isinstance(weight, Quantised)}
    wide = {96: 32, 128: 64} if block == 16 and name != "q8" else {96: block, 128: block}
    assert found["wte.weight"] == BlockFormat(8, wide[96])
    assert found["h.0.attn.c_proj.weight"] == BlockFormat(8 if name == "q8" else 4, block)
    assert found["h.0.mlp.c_proj.weight"] == (
        BlockFormat(4, block) if name == "q4:plain" else BlockFormat(8, wide[128])
    )


def test_a_graph_with_blocks_of_several_sizes_is_proven(tmp_path: Path) -> None:
    exports = plan(checkpoint_of(*tiny_gpt2(**SIZES)), Options(quantize=("q4",), no_base=True, block_size=16))
    write_planned(tmp_path, exports[0].files)
    report = verify_exports(exports, str(tmp_path))
    assert report.passed, report.table()
