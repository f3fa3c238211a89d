"""Model card snippets: how each library loads the ONNX graph."""

from __future__ import annotations

from collections.abc import Callable

from gptconvert.targets.onnx.plan import NAME, has_cache, takes_positions
from gptconvert.targets.package.sidecars import JS_DTYPE
from gptconvert.targets.target import CardFacts, Snippet

#: Families that transformers.js has model classes for.
IN_TRANSFORMERS_JS = frozenset({"gpt2", "gpt_neo", "gptj", "gpt_neox"})

ONNXRUNTIME = """
import numpy as np
import onnxruntime
{tokenizers}
session = onnxruntime.InferenceSession("{graph}")
ids = np.array([{ids}])
feed = {{"input_ids": ids, "attention_mask": np.ones_like(ids){positions}}}
{past}{output} = session.run(["{output}"], feed)[0]
"""
PAST = """past = np.zeros((1, {heads}, 0, {head_dim}), np.float32)  # no tokens seen yet
feed |= {{f"past_key_values.{{i}}.{{part}}": past for i in range({layers}) for part in ("key", "value")}}
"""
POSITIONS = ', "position_ids": np.arange(ids.shape[1])[None]'
OPTIMUM = """
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model, tokenizer = ORTModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
output = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(output[0]))
"""
TRANSFORMERS_JS = """
import {{ env, pipeline }} from "@huggingface/transformers";

env.localModelPath = "models/";
env.allowRemoteModels = false;
const generate = await pipeline("text-generation", "my-model", {{ dtype: "{dtype}" }});
console.log(await generate("Hello", {{ max_new_tokens: 20 }}));
"""
GENAI = """
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=32)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Hello"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""


def _graph(facts: CardFacts) -> str:
    export = facts.of(NAME)
    return export.path if export is not None else "onnx/model.onnx"


def _onnxruntime(facts: CardFacts) -> str:
    config = facts.checkpoint.config
    past = PAST.format(layers=config.n_layer, heads=config.n_head, head_dim=config.head_dim)
    return ONNXRUNTIME.format(
        tokenizers="from tokenizers import Tokenizer\n" if facts.tokenized else "",
        graph=_graph(facts),
        ids='Tokenizer.from_file("tokenizer.json").encode("Hello").ids' if facts.tokenized else "[0, 1, 2]",
        positions=POSITIONS if takes_positions(config, facts.options) else "",
        past=past if has_cache(config, facts.options) else "",
        output="logits" if facts.generates else "last_hidden_state",
    )


def _continues_text(facts: CardFacts) -> bool:
    """Whether the graph can generate text in any runtime: it needs a KV cache and a tokenizer."""
    return facts.generates and facts.tokenized and has_cache(facts.checkpoint.config, facts.options)


def _transformers_js(facts: CardFacts) -> str | None:
    dtype = JS_DTYPE.get(_graph(facts).rpartition("/")[2])
    if not _continues_text(facts) or facts.checkpoint.config.family not in IN_TRANSFORMERS_JS or dtype is None:
        return None
    return TRANSFORMERS_JS.format(dtype=dtype)


def _for_text(code: str) -> Callable[[CardFacts], str | None]:
    return lambda facts: code if _continues_text(facts) else None


SNIPPETS = (
    Snippet("onnxruntime", "python", _onnxruntime),
    Snippet("optimum", "python", _for_text(OPTIMUM)),
    Snippet("transformers.js, with this directory at `models/my-model`", "js", _transformers_js),
    Snippet("onnxruntime-genai", "python", _for_text(GENAI)),
)
