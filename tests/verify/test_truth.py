from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptconvert.errors import InputError
from gptconvert.model.checkpoint import Checkpoint
from gptconvert.model.dtypes import BFLOAT16
from gptconvert.model.transforms import cast
from gptconvert.verify import truth as truth_module
from gptconvert.verify.probes import Probe, make_probes
from gptconvert.verify.truth import Truth, TruthPass
from reference_model.config import Rotary
from tests.helpers import ROOT, checkpoint_of, tiny_gpt2, torch_weights
from tests.verify.exports import altered, tiny


def truth_of(checkpoint: Checkpoint, probes: tuple[Probe, ...] | list[Probe], **fields: Any) -> Truth:
    return TruthPass(checkpoint, probes, "float32", presents=True, taps=True, **fields).run()


def worst_difference(checkpoint: Checkpoint, probes: tuple[Probe, ...], run: Any) -> dict[str, float]:
    """Largest difference between the packed pass and ``run(probe)`` → (output, [(k, v)]) in float64, by kind."""
    truth, worst = truth_of(checkpoint, probes), {"output": 0.0, "present": 0.0}
    name = next(n for n in truth.values if n in ("logits", "last_hidden_state"))
    for probe in probes:
        output, presents = run(probe)
        for row in (row for row in truth.pack.rows if row.probe is probe):
            expected = output[row.row][row.new]
            worst["output"] = max(worst["output"], float((expected - truth.values[name][row.tokens]).abs().max()))
            for i, pair in enumerate(presents):
                for part, present in zip(("key", "value"), pair, strict=True):
                    new = present[row.row][:, probe.past_length + row.new].transpose(0, 1).flatten(1)
                    gap = (new - truth.values[f"present.{i}.{part}"][row.tokens]).abs().max()
                    worst["present"] = max(worst["present"], float(gap))
    return worst


def doubles(checkpoint: Checkpoint, probe: Probe) -> list[tuple[Any, Any]]:
    import torch

    layers = range(checkpoint.config.n_layer if probe.past_length else 0)
    return [tuple(torch.from_numpy(a).double() for a in probe.past(i, checkpoint.config)) for i in layers]  # type: ignore[misc]


@pytest.mark.parametrize("scale_by_layer", [False, True])
def test_truth_equals_transformers_in_float64(scale_by_layer: bool) -> None:
    import torch
    from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

    raw, arrays = tiny_gpt2(7, scale_attn_by_inverse_layer_idx=scale_by_layer)
    checkpoint = checkpoint_of(raw, arrays)
    witness = GPT2LMHeadModel(GPT2Config(**raw)).double().eval()
    state = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
    witness.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})

    def run(probe: Probe) -> Any:
        cache = DynamicCache()
        for i, (key, value) in enumerate(doubles(checkpoint, probe)):
            cache.update(key, value, i)
        with torch.no_grad():
            out = witness(
                torch.from_numpy(probe.input_ids),
                attention_mask=torch.from_numpy(probe.attention_mask),
                position_ids=torch.from_numpy(probe.position_ids),
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]

    worst = worst_difference(checkpoint, make_probes(checkpoint.config, kv_cache=True, level="full"), run)
    assert worst["output"] < 1e-12 and worst["present"] < 1e-12, worst


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"attn_window": (None, 4)},
        {"rotary": Rotary(4, interleaved=True)},
        {"rotary": Rotary(8)},
        {"residual": "parallel"},
        {"norm_position": "post", "final_norm": False},
    ],
    ids=str,
)
def test_packing_changes_nothing(config: dict[str, Any]) -> None:
    """The packed pass agrees with the reference model run probe by probe, padding included."""
    import torch

    from reference_model.model import GPT

    checkpoint = altered(tiny_checkpoint(), **config)
    model = GPT.from_weights(checkpoint.config, torch_weights(checkpoint))

    def run(probe: Probe) -> Any:
        arrays = (probe.input_ids, probe.attention_mask, probe.position_ids)
        with torch.no_grad():
            return model(*map(torch.from_numpy, arrays), doubles(checkpoint, probe) or None)

    worst = worst_difference(checkpoint, make_probes(checkpoint.config, kv_cache=True, level="full"), run)
    assert worst["output"] < 1e-13 and worst["present"] < 1e-13, worst


def tiny_checkpoint() -> Checkpoint:
    return checkpoint_of(*tiny_gpt2(5))


def test_head_on_some_tokens_at_a_time(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, tie_word_embeddings=False)
    probes = make_probes(checkpoint.config, kv_cache=True)
    whole = truth_of(checkpoint, probes)
    parts = truth_of(checkpoint, probes, head_tokens=7)
    assert np.allclose(whole.values["logits"], parts.values["logits"], rtol=0, atol=1e-14)
    assert np.allclose(whole.noise["logits"].largest, parts.noise["logits"].largest, rtol=0.5)
    assert whole.values["logits"].shape == (whole.pack.length, 97)


@pytest.mark.parametrize("transposed", [False, True], ids=["[out, in]", "[in, out]"])
@pytest.mark.parametrize("elements", [1, 50, 1 << 19])
def test_linear_layers_in_parts(transposed: bool, elements: int) -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    weight = torch.randn(7, 24, dtype=torch.bfloat16)
    stored = {"weight": weight.T.contiguous().T if transposed else weight, "bias": torch.randn(7)}
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    with torch.device("meta"):
        layer = nn.Linear(24, 7)
    pass_ = truth_module.PrecisionPass(torch.float64, torch.empty(elements, dtype=torch.float64))
    pass_.fill(layer, stored, tiny_checkpoint().config, "")
    with torch.no_grad():
        expected = x @ stored["weight"].double().T + stored["bias"].double()
        assert torch.allclose(layer(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16])
def test_stored_type_is_widened_exactly(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    stored = tiny(tmp_path)
    narrow = dataclasses.replace(stored, weights={n: cast(w, dtype) for n, w in stored.weights.items()})
    wide_dtype = np.dtype(np.float64)
    wide = dataclasses.replace(narrow, weights={n: cast(w, wide_dtype) for n, w in narrow.weights.items()})
    probes = make_probes(stored.config, kv_cache=True)
    first, second = (truth_of(c, probes).values["logits"] for c in (narrow, wide))
    assert np.allclose(first, second, rtol=0, atol=1e-13)


def test_noise_is_float32_noise(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    truth = truth_of(checkpoint, make_probes(checkpoint.config, kv_cache=True))
    relative = float(truth.noise["logits"].square.sum().sqrt() / truth.values["logits"].norm())
    assert 1e-8 < relative < 1e-6


def test_nan_in_the_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    raw, arrays = tiny_gpt2()
    arrays["transformer.h.1.mlp.c_fc.bias"][3] = np.nan
    checkpoint = checkpoint_of(raw, arrays, tmp_path)
    with pytest.raises(InputError, match="NaN") as caught:
        TruthPass(checkpoint, make_probes(checkpoint.config, kv_cache=False), "float32", presents=False).run()
    assert caught.value.item == "logits"


MEMORY = """
import sys
import numpy as np
import torch
from gptconvert.families.registry import understand
from gptconvert.model.options import Options
from gptconvert.model.tensors import TensorSet, filled
from gptconvert.verify.probes import make_probes
from gptconvert.verify.truth import TruthPass
from tests.helpers import source_of

D, L = 384, int(sys.argv[1])
shapes = {"wte.weight": (97, D), "wpe.weight": (40, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
for i in range(L):
    linear = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
    shapes |= {f"h.{i}.{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"h.{i}.{name}.bias": shape[1:] for name, shape in linear.items()}
    shapes |= {f"h.{i}.ln_{n}.{part}": (D,) for n in (1, 2) for part in ("weight", "bias")}
raw = {"model_type": "gpt2", "vocab_size": 97, "n_positions": 40, "n_embd": D, "n_layer": L, "n_head": 3}
tensors = {name: filled(0.01, np.dtype(np.float32), shape) for name, shape in shapes.items()}
checkpoint = understand(source_of(raw, TensorSet(tensors, ())), Options())

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

torch.set_num_threads(1)
probes = make_probes(checkpoint.config, kv_cache=False)[:3]
peaks = []
TruthPass(checkpoint, probes, "float32", presents=False).run(lambda layers: peaks.append(anonymous()))
print(max(peaks))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_layers() -> None:
    """24 more layers take 170 MB in float32 and 340 MB in float64; the slack is one block."""
    peaks = []
    for layers in ("4", "28"):
        command = [sys.executable, "-c", MEMORY, layers]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout))
    assert peaks[1] - peaks[0] < 20, peaks
