"""Python code for the model card that uses a model through transformers' interface, which optimum shares."""

from __future__ import annotations

from collections.abc import Mapping

from gptconvert.families.registry import family_named
from gptconvert.targets.target import CardFacts

#: Task → the end of the name of transformers' ``AutoModel…``. The class of double heads has no such name.
SUFFIXES: Mapping[str, str] = {
    "text-generation": "ForCausalLM",
    "feature-extraction": "",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
#: BERT's tokenizer returns token types, which GPT-2 would take for tokens, and marks the end of a text, so that a
#: prompt would not be continued.
BERT_OPTIONS, BERT_PROMPT = ", return_token_type_ids=False", ", add_special_tokens=False"
LOAD = """
from {module} import {model_class}

model = {load}
"""
USE = """
{imports}

model, tokenizer = {load}, AutoTokenizer.from_pretrained(".")
"""
#: Task → its use. ``{options}`` ends the tokenizer's arguments.
USES: Mapping[str, str] = {
    "text-generation": """
output = model.generate(**tokenizer("Hello", return_tensors="pt"{options}), max_new_tokens=20)
print(tokenizer.decode(output[0]))
""",
    "feature-extraction": """
output = model(**tokenizer("Hello", return_tensors="pt"{options}))
print(output.last_hidden_state.shape)
""",
    "text-classification": """
output = model(**tokenizer("Hello", return_tensors="pt"{options}))
print(model.config.id2label[int(output.logits.argmax())])
""",
    "token-classification": """
output = model(**tokenizer("Hello", return_tensors="pt"{options}))
print([model.config.id2label[label] for label in output.logits[0].argmax(-1).tolist()])
""",
    "question-answering": """
inputs = tokenizer("Who wrote it?", "Ann wrote it.", return_tensors="pt"{options})
output = model(**inputs)
start, end = int(output.start_logits.argmax()), int(output.end_logits.argmax())
print(tokenizer.decode(inputs["input_ids"][0][start : end + 1]))
""",
    "multiple-choice": """
choices = [tokenizer(text)["input_ids"] for text in ("Hello there", "Hello again, Ann")]
length = max(map(len, choices))
ids = torch.tensor([[row + [0] * (length - len(row)) for row in choices]])  # one question
output = model(ids, mc_token_ids=torch.tensor([[len(row) - 1 for row in choices]]))
print(output.mc_logits)
""",
}


def python_code(facts: CardFacts, module: str, model_class: str, arguments: str = "") -> str:
    """Load the model from this directory and, if there is a tokenizer, use it.

    Args:
        facts: the exports and the options.
        module: that defines the class.
        model_class: its name.
        arguments: further ones of ``from_pretrained``, with a leading comma.
    """
    load = f'{model_class}.from_pretrained("."{arguments})'
    if not facts.tokenized:
        return LOAD.format(module=module, model_class=model_class, load=load)
    task = facts.checkpoint.config.task
    options = BERT_OPTIONS if uses_bert_tokenizer(facts) else ""
    options += BERT_PROMPT if options and facts.generates else ""
    code = USE.format(imports=_imports(task, module, model_class), load=load)
    return code + USES[task].lstrip("\n").format(options=options)


def uses_bert_tokenizer(facts: CardFacts) -> bool:
    """Whether the tokenizer is BERT's, as in Chinese models."""
    return "vocab.txt" in facts.files


def auto_class(facts: CardFacts) -> str:
    """transformers' class for the model."""
    config = facts.checkpoint.config
    suffix = SUFFIXES.get(config.task)
    return family_named(config.family).heads[config.task] if suffix is None else f"AutoModel{suffix}"


def _imports(task: str, module: str, model_class: str) -> str:
    torch = "import torch\n" if task == "multiple-choice" else ""
    if module != "transformers":
        return f"{torch}from {module} import {model_class}\nfrom transformers import AutoTokenizer"
    return f"{torch}from transformers import {', '.join(sorted([model_class, 'AutoTokenizer']))}"
