"""Model card snippets: how each library loads the ONNX graph.

A snippet gives the graph exactly the inputs that it takes. If a library cannot use the graph as it is, the card says
what to do.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.targets.onnx.plan import NAME, has_cache, takes_positions
from gptconvert.targets.package.sidecars import JS_DTYPE
from gptconvert.targets.python_code import BERT_PROMPT, SUFFIXES, python_code, uses_bert_tokenizer
from gptconvert.targets.target import CardFacts, Snippet
from reference_model.config import OUTPUTS

#: Types that the browser builds of onnxruntime cannot convert to float32.
NOT_IN_BROWSERS = frozenset({"bfloat16", "float64"})

ONNXRUNTIME = """
import numpy as np
import onnxruntime
{tokenizers}
session = onnxruntime.InferenceSession("{graph}")
{ids}
feed = {{"input_ids": ids, "attention_mask": np.ones_like(ids){more}}}
{past}{outputs} = session.run([{names}], feed){first}
"""
TOKENIZED = 'ids = np.array([Tokenizer.from_file("tokenizer.json").encode({text}).ids])'
TEXTS: Mapping[str, str] = {"question-answering": '"Who wrote it?", "Ann wrote it."'}
CHOICES = """choices = {choices}
length = max(map(len, choices))
ids = np.array([[row + [0] * (length - len(row)) for row in choices]])  # one question"""
TOKENIZED_CHOICES = """tokenizer = Tokenizer.from_file("tokenizer.json")
""" + CHOICES.format(choices='[tokenizer.encode(text).ids for text in ("Hello there", "Hello again, Ann")]')
PAST = """past = np.zeros((1, {heads}, 0, {head_dim}), np.float32)  # no tokens seen yet
feed |= {{f"past_key_values.{{i}}.{{part}}": past for i in range({layers}) for part in ("key", "value")}}
"""
POSITIONS = ', "position_ids": np.broadcast_to(np.arange(ids.shape[-1]), ids.shape)'
LAST_TOKENS = ', "mc_token_ids": np.array([[len(row) - 1 for row in choices]])'
JS_SETTINGS = """
env.allowLocalModels = true; // in browsers, false by default
env.allowRemoteModels = false;
env.localModelPath = "./models/";
"""
JS_GENERATE = """
import { env, pipeline } from "@huggingface/transformers";
%(settings)s
const generate = await pipeline("text-generation", "my-model", { dtype: "%(dtype)s" });
console.log(await generate("Hello", { max_new_tokens: 20 }));
"""
JS_GENERATE_GPT1 = """
import { AutoConfig, env, pipeline } from "@huggingface/transformers";
%(settings)s
const config = await AutoConfig.from_pretrained("my-model");
config.model_type = "gpt2";
const generate = await pipeline("text-generation", "my-model", { dtype: "%(dtype)s", config });
console.log(await generate("Hello", { max_new_tokens: 20 }));
"""
JS_RUN = """
import { AutoModel, AutoTokenizer, env } from "@huggingface/transformers";
%(settings)s
const model = await AutoModel.from_pretrained("my-model", { dtype: "%(dtype)s" });
const tokenizer = await AutoTokenizer.from_pretrained("my-model");
const { %(outputs)s } = await model(tokenizer(%(text)s));
console.log(%(lists)s);
"""
#: transformers.js drops the second text of a pair.
JS_TEXTS: Mapping[str, str] = {"question-answering": '"Who wrote it?" + "Ann wrote it."'}
GENAI = """
import onnxruntime_genai as og
{imports}
model = og.Model(".")
tokenizer = {tokenizer}
params = og.GeneratorParams(model)
params.set_search_options(max_length=32)
generator = og.Generator(model, params)
generator.append_tokens({ids})
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""


def _graph(facts: CardFacts) -> str:
    export = facts.of(NAME)
    return export.path if export is not None else "onnx/model.onnx"


def _cached(facts: CardFacts) -> bool:
    return has_cache(facts.checkpoint.config, facts.options)


def _onnxruntime(facts: CardFacts) -> str:
    config, names = facts.checkpoint.config, OUTPUTS[facts.checkpoint.config.task]
    more = POSITIONS if takes_positions(config, facts.options) else ""
    past = PAST.format(layers=config.n_layer, heads=config.n_head, head_dim=config.head_dim)
    return ONNXRUNTIME.format(
        tokenizers="from tokenizers import Tokenizer\n" if facts.tokenized else "",
        graph=_graph(facts),
        ids=_ids(config.task, facts.tokenized),
        more=more + (LAST_TOKENS if config.task == "multiple-choice" else ""),
        past=past if _cached(facts) else "",
        outputs=", ".join(names),
        names=", ".join(f'"{name}"' for name in names),
        first="[0]" if len(names) == 1 else "",
    )


def _ids(task: str, tokenized: bool) -> str:
    if task == "multiple-choice":
        return TOKENIZED_CHOICES if tokenized else CHOICES.format(choices="[[0, 1], [0, 1, 2]]")
    return TOKENIZED.format(text=TEXTS.get(task, '"Hello"')) if tokenized else "ids = np.array([[0, 1, 2]])"


def _optimum(facts: CardFacts) -> str | None:
    """optimum passes positions and a cache only to language models."""
    config = facts.checkpoint.config
    has_class = config.task in SUFFIXES and (facts.generates or not takes_positions(config, facts.options))
    if not (facts.tokenized and has_class):
        return None
    model_class = f"ORTModel{SUFFIXES[config.task] or 'ForFeatureExtraction'}"
    uncached = facts.generates and not _cached(facts)
    return python_code(facts, "optimum.onnxruntime", model_class, ", use_cache=False" if uncached else "")


def _in_browsers(facts: CardFacts) -> bool:
    return not NOT_IN_BROWSERS & {weight.dtype.name for weight in facts.checkpoint.weights.values()}


def _transformers_js(facts: CardFacts) -> str | None:
    """transformers.js passes positions and a cache to models of the classes that it has: not to GPT-1."""
    config, dtype = facts.checkpoint.config, JS_DTYPE.get(_graph(facts).rpartition("/")[2])
    gpt1 = config.family == "gpt1"
    if dtype is None or not _in_browsers(facts) or not facts.tokenized or config.task == "multiple-choice":
        return None
    if facts.generates:
        code = JS_GENERATE_GPT1 if gpt1 else JS_GENERATE
        return code % {"settings": JS_SETTINGS.strip(), "dtype": dtype} if _cached(facts) else None
    if gpt1 and takes_positions(config, facts.options):
        return None
    names = OUTPUTS[config.task]
    lists = ", ".join(f"{name}.tolist()" for name in names)
    text = JS_TEXTS.get(config.task, '"Hello"')
    values = {"outputs": ", ".join(names), "lists": lists, "text": text}
    return JS_RUN % {"settings": JS_SETTINGS.strip(), "dtype": dtype, **values}


def _about_transformers_js(facts: CardFacts) -> str | None:
    if not _in_browsers(facts):
        return "browsers cannot read bfloat16 or float64 weights; convert with `--dtype fp16` or `--dtype fp32`"
    if facts.checkpoint.config.family == "gpt1" and facts.generates and _transformers_js(facts):
        return "it has no class for GPT-1, but GPT-2's takes the same inputs"
    return None


def _genai(facts: CardFacts) -> str | None:
    if not (facts.generates and facts.tokenized and _cached(facts)):
        return None
    if not _foreign_to_genai(facts):
        return GENAI.format(imports="", tokenizer="og.Tokenizer(model)", ids='tokenizer.encode("Hello")')
    prompt = BERT_PROMPT if uses_bert_tokenizer(facts) else ""
    return GENAI.format(
        imports="from tokenizers import Tokenizer\n",
        tokenizer='Tokenizer.from_file("tokenizer.json")',
        ids=f'tokenizer.encode("Hello"{prompt}).ids',
    )


def _foreign_to_genai(facts: CardFacts) -> bool:
    return facts.checkpoint.config.family == "gpt1" or uses_bert_tokenizer(facts)


def _about_genai(facts: CardFacts) -> str | None:
    foreign = _genai(facts) and _foreign_to_genai(facts)
    return "it does not support this tokenizer, so the tokenizers library is used" if foreign else None


SNIPPETS = (
    Snippet("onnxruntime", "python", _onnxruntime),
    Snippet("optimum", "python", _optimum),
    Snippet("transformers.js", "js", _transformers_js, _about_transformers_js, "this directory at `models/my-model`"),
    Snippet("onnxruntime-genai", "python", _genai, _about_genai),
)
