"""Model card snippets: how each library loads the ONNX graph.

A snippet gives the graph exactly the inputs that it takes. If a library cannot use the graph as it is, the card says
what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gptconvert.model.export import Export
from gptconvert.targets.onnx.card_graphs import computes_in_half, kind_of
from gptconvert.targets.onnx.plan import NAME
from gptconvert.targets.onnx.variants import has_cache, takes_positions
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
PAST = """past = np.zeros((1, {heads}, 0, {head_dim}), np.{number})  # no tokens seen yet
feed |= {{f"past_key_values.{{i}}.{{part}}": past for i in range({layers}) for part in ("key", "value")}}
"""
POSITIONS = ', "position_ids": np.broadcast_to(np.arange(ids.shape[-1]), ids.shape)'
LAST_TOKENS = ', "mc_token_ids": np.array([[len(row) - 1 for row in choices]])'
IN_PLACE = """
import numpy as np
import onnxruntime
{tokenizers}
session = onnxruntime.InferenceSession("{graph}")
binding = session.io_binding()
for i in range({layers}):  # buffers for the whole context, bound once; the graph writes into them
    for part in ("key", "value"):
        shape = (1, {heads}, {context}, {head_dim})
        buffer = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
        binding.bind_ortvalue_input(f"past_key_values.{{i}}.{{part}}", buffer)
        binding.bind_ortvalue_output(f"present.{{i}}.{{part}}", buffer)
{ids}
new = ids
for _ in range(20):
    binding.bind_cpu_input("input_ids", np.array([new]))
    binding.bind_cpu_input("attention_mask", np.ones((1, len(ids)), np.int64))
    binding.bind_cpu_input("position_ids", np.arange(len(ids) - len(new), len(ids))[None])
    binding.bind_output("logits")  # anew, because its shape changes
    session.run_with_iobinding(binding)
    logits = binding.get_outputs()[-1].numpy()
    new = [int(logits[0, -1].argmax())]
    ids += new
print({text})
"""
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
    export = facts.of(NAME)
    number = "float16" if export is not None and computes_in_half(export, facts) else "float32"
    past = PAST.format(layers=config.n_layer, heads=config.n_head, head_dim=config.head_dim, number=number)
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
    arguments = ", use_cache=False" if facts.generates and not _cached(facts) else ""
    folder, _, file = _graph(facts).rpartition("/")
    if len(facts.all_of(NAME)) > 1 and file != "model.onnx":  # else optimum would choose among the graphs
        arguments += f', subfolder="{folder}", file_name="{file}"'
    return python_code(facts, "optimum.onnxruntime", model_class, arguments)


def _in_place(facts: CardFacts) -> str | None:
    """Greedy decoding with the first graph that keeps its cache in place."""
    export, config = next((e for e in facts.all_of(NAME) if kind_of(e) == "in_place"), None), facts.checkpoint.config
    if export is None:
        return None
    code = 'tokenizer = Tokenizer.from_file("tokenizer.json")\nids = tokenizer.encode("Hello").ids'
    return IN_PLACE.format(
        tokenizers="from tokenizers import Tokenizer\n" if facts.tokenized else "",
        graph=export.path,
        ids=code if facts.tokenized else "ids = [0, 1, 2]",
        text="tokenizer.decode(ids)" if facts.tokenized else "ids",
        layers=config.n_layer,
        heads=config.n_head,
        head_dim=config.head_dim,
        context=config.n_ctx,
    )


def _js_dtypes(facts: CardFacts) -> Sequence[str]:
    """The dtypes by which transformers.js loads a graph here, the default of config.json first."""
    names = [_js_dtype(export) for export in facts.all_of(NAME) if _in_browsers(export)]
    found = [name for name in names if name is not None]
    return sorted(found, key=list(JS_DTYPE.values()).index)


def _js_dtype(export: Export) -> str | None:
    return JS_DTYPE.get(export.path.rpartition("/")[2])


def _in_browsers(export: Export) -> bool:
    return not NOT_IN_BROWSERS & {weight.dtype.name for weight in export.checkpoint.weights.values()}


def _transformers_js(facts: CardFacts) -> str | None:
    """transformers.js passes positions and a cache to models of the classes that it has: not to GPT-1."""
    config, dtypes = facts.checkpoint.config, _js_dtypes(facts)
    gpt1 = config.family == "gpt1"
    if not dtypes or not facts.tokenized or config.task == "multiple-choice":
        return None
    dtype = dtypes[0]
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
    if not any(map(_in_browsers, facts.all_of(NAME))):
        return "browsers cannot read bfloat16 or float64 weights; convert with `--dtype fp16` or `--dtype fp32`"
    if _transformers_js(facts) is None:
        return None
    remarks = []
    if facts.checkpoint.config.family == "gpt1" and facts.generates:
        remarks.append("it has no class for GPT-1, but GPT-2's takes the same inputs")
    if others := [f"`{dtype}`" for dtype in _js_dtypes(facts)[1:]]:
        remarks.append(f"other dtypes here: {', '.join(others)}")
    return "; ".join(remarks) or None


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
    Snippet("In-place cache with onnxruntime", "python", _in_place),
    Snippet("optimum", "python", _optimum),
    Snippet("transformers.js", "js", _transformers_js, _about_transformers_js, "this directory at `models/my-model`"),
    Snippet("onnxruntime-genai", "python", _genai, _about_genai),
)
