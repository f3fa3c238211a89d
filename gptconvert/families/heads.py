"""Task heads, which all families share: their tensors, and the choice of a checkpoint's task.

Names, shapes and biases are those of Hugging Face's ``…LMHeadModel``, ``…DoubleHeadsModel``,
``…ForSequenceClassification``, ``…ForTokenClassification`` and ``…ForQuestionAnswering``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from gptconvert.errors import InputError, UnsupportedError
from gptconvert.families.keys import SUMMARY_KEYS
from gptconvert.model.config_table import Reading
from gptconvert.model.options import Options
from gptconvert.model.schemes import Drop, Row, Scheme, Tied
from gptconvert.model.tensors import LazyTensor
from reference_model.config import LABELLED_TASKS, GPTConfig

#: Task → tensors that identify its head, the most specific task first.
HEAD_TENSORS: Mapping[str, tuple[str, ...]] = {
    "multiple-choice": ("multiple_choice_head.summary.weight",),
    "text-classification": ("score.weight",),
    "token-classification": ("classifier.weight",),
    "question-answering": ("qa_outputs.weight",),
    "text-generation": ("lm_head.weight", "embed_out.weight", "lm_head.decoder.weight"),
}
#: The task of a model without a head.
BARE = "feature-extraction"
#: Number of labels of the tasks where it is fixed.
FIXED_LABELS: Mapping[str, int] = {"question-answering": 2, "multiple-choice": 1}


def own_lm_head(config: GPTConfig) -> bool:
    """Whether the model has a language-model head separate from the embedding."""
    return config.has_lm_head and not config.tied_head


def tied_lm_head(config: GPTConfig) -> bool:
    """Whether the model has a language-model head tied to the embedding."""
    return config.has_lm_head and config.tied_head


def lm_head_bias(config: GPTConfig) -> bool:
    """Whether the model has a language-model head with a bias."""
    return config.has_lm_head and config.head_bias


def _for(task: str) -> Callable[[GPTConfig], bool]:
    return lambda config: config.task == task


def _not_for(task: str) -> Callable[[GPTConfig], bool]:
    return lambda config: config.task != task


#: All heads except the language model's.
HEAD_ROWS = (
    Row("score.weight", "score.weight", "K D", when=_for("text-classification"), head=True),
    Row("classifier.weight", "classifier.weight", "K D", when=_for("token-classification"), head=True),
    Row("classifier.bias", "classifier.bias", "K", when=_for("token-classification"), head=True),
    Row("qa_outputs.weight", "qa_outputs.weight", "2 D", when=_for("question-answering"), head=True),
    Row("qa_outputs.bias", "qa_outputs.bias", "2", when=_for("question-answering"), head=True),
    Row("mc_head.weight", "multiple_choice_head.summary.weight", "1 D", when=_for("multiple-choice"), head=True),
    Row("mc_head.bias", "multiple_choice_head.summary.bias", "1", when=_for("multiple-choice"), head=True),
)
#: Heads of tasks other than the chosen one.
HEAD_DROPS = (
    Drop(r"(lm_head|embed_out)\.(decoder\.)?(weight|bias)", "language-model head", when=lambda c: not c.has_lm_head),
    Drop(r"score\.weight", "text-classification head", when=_not_for("text-classification")),
    Drop(r"classifier\.(weight|bias)", "token-classification head", when=_not_for("token-classification")),
    Drop(r"qa_outputs\.(weight|bias)", "question-answering head", when=_not_for("question-answering")),
    Drop(r"multiple_choice_head\.summary\.(weight|bias)", "multiple-choice head", when=_not_for("multiple-choice")),
)


#: Heads that score states in reinforcement learning (trl, trlx); exports hold the policy alone.
VALUE_HEADS = Drop(
    r"(v_head|value_head|ilql_heads)\..+", "value head", note="the value head of reinforcement learning is left out"
)

#: The head's name in DialoGPT's own files.
DIALOGPT_HEAD = "lm_head.decoder.weight"
#: A language-model head separate from the embedding.
LM_HEAD = Row("lm_head.weight", "lm_head.weight", "V D", when=own_lm_head, head=True, aliases=(DIALOGPT_HEAD,))


def embedding(stored: str, head: Row = LM_HEAD) -> tuple[Row, Row]:
    """The token embedding, which models with a tied head may store under the head's name alone.

    safetensors' ``save_model`` keeps one name of tensors that share memory.
    """
    aliases = (*head.names, *head.aliases)
    return (
        Row("wte.weight", stored, "V D", when=lambda c: not c.tied_head),
        Row("wte.weight", stored, "V D", when=lambda c: c.tied_head, aliases=aliases),
    )


def hf_scheme(
    *rows: Row,
    anchor: str = "wte.weight",
    fallback: str = "ln_f.weight",
    body: str = "transformer.",
    attention: str = r"h\.\d+\.attn",
    drops: tuple[Drop, ...] = (),
    lm_head: Row = LM_HEAD,
) -> Scheme:
    """A family's name table for Hugging Face's files: its body ``rows`` plus the parts common to all families.

    Args:
        rows: rows of the transformer body.
        anchor: a tensor present in every file.
        fallback: another, for files without the first one.
        body: prefix of body names.
        attention: regular expression for an attention module, which may contain mask buffers.
        drops: further tensors to ignore.
        lm_head: the row of an untied language-model head.
    """
    names = (*lm_head.names, *lm_head.aliases)
    masks = (Drop(rf"{attention}\.bias", "causal mask buffer"), Drop(rf"{attention}\.masked_bias", "mask constant"))
    return Scheme(
        name="hf",
        anchor=anchor,
        fallback=fallback,
        prefixes=None,
        separator=".",
        body=body,
        write_prefix=body,
        rows=(*rows, lm_head, *HEAD_ROWS),
        drops=(*drops, *masks, *HEAD_DROPS, VALUE_HEADS),
        tied=tuple(Tied(name, "wte.weight", "V D", when=tied_lm_head) for name in names),
    )


def choose_task(
    heads: Mapping[str, str],
    raw: Mapping[str, object],
    path: str | None,
    tensors: Mapping[str, LazyTensor],
    request: Options,
    *,
    tied: bool,
) -> str:
    """The requested task; else the one in ``architectures``; else the most specific one whose head is present.

    Without ``architectures``, a bare body with a tied head counts as a language model.

    Args:
        heads: the family's tasks and architectures.
        raw: config.json.
        path: of config.json, used in error messages.
        tensors: the tensors in the files.
        request: the user's options.
        tied: whether the language-model head has no tensor of its own.

    Raises:
        UnsupportedError: the requested task has no head in this family or in these files.
    """
    here = [task for task in heads if _has_head(task, tensors, tied)]
    if request.task is None:
        declared = _declared_task(heads, raw)
        return declared or next(task for task in (*HEAD_TENSORS, "feature-extraction") if task in here)
    if request.task not in here:
        missing = " or ".join(HEAD_TENSORS.get(request.task, ())) if request.task in heads else ""
        raise UnsupportedError(
            f"this checkpoint has no head for {request.task}"
            if missing
            else f"this family has no model for {request.task}",
            path=path,
            expected=missing or f"one of {', '.join(heads)}",
            found=f"heads for {', '.join(here)}",
            hint=f"pass --task {here[0]}, or leave --task out",
        )
    return request.task


def _has_head(task: str, tensors: Mapping[str, LazyTensor], tied: bool) -> bool:
    if task == "feature-extraction" or (task == "text-generation" and tied):
        return True
    return any(_ends_with(name, ends) for ends in HEAD_TENSORS[task] for name in tensors)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _declared_task(heads: Mapping[str, str], raw: Mapping[str, object]) -> str | None:
    """The task of the first of ``architectures`` that names a head, or else a bare model.

    TensorFlow's and Flax's classes count too.
    """
    declared = raw.get("architectures")
    names = [n for n in declared if isinstance(n, str)] if isinstance(declared, list) else []
    plain = [name.removeprefix("TF").removeprefix("Flax") for name in names]
    tasks = [task for name in plain for task, known in heads.items() if name == known]
    return next((task for task in tasks if task != BARE), BARE if tasks else None)


def _body_notes(
    heads: Mapping[str, str], raw: Mapping[str, object], task: str, tensors: Iterable[str], request: Options
) -> list[str]:
    """A note if a bare model is exported as a language model, or the other way round."""
    declared = _declared_task(heads, raw)
    stored = any(_ends_with(name, end) for end in HEAD_TENSORS["text-generation"] for name in tensors)
    note = ""
    if declared == BARE and task == "text-generation":
        note = f"it is exported with a language-model head, as {heads[task]} (--task {task})"
    elif declared == "text-generation" and task == BARE:
        note = f"its language-model head is left out (--task {BARE})"
    elif declared == BARE and request.task is None and stored:
        note = "the language-model head in the files is left out (--task text-generation exports it)"
    return [f"config.json names {heads[declared]}: {note}"] if declared is not None and note else []


def count_labels(task: str, raw: Mapping[str, object], path: str | None, tensors: Mapping[str, LazyTensor]) -> int:
    """K: from the configuration (``id2label``, then ``num_labels``), else the number of rows of the head.

    Raises:
        InputError: the number of labels is not a positive integer.
    """
    if task not in LABELLED_TASKS:
        return FIXED_LABELS.get(task, 0)
    names = raw.get("id2label")
    if isinstance(names, Mapping) and names:
        return len(names)
    for key in ("num_labels", "_num_labels"):
        value = raw.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError("wrong value", path=path, item=key, expected="at least 1", found=repr(value)[:80])
        if isinstance(value, int):
            return value
    shapes = [t.shape for n, t in tensors.items() if any(_ends_with(n, end) for end in HEAD_TENSORS[task])]
    return shapes[0][0] if shapes and shapes[0] else 2  # transformers' default


def head_fields(
    heads: Mapping[str, str],
    reading: Reading,
    tensors: Mapping[str, LazyTensor],
    request: Options,
    *,
    head_bias: bool,
) -> tuple[dict[str, object], list[str]]:
    """The fields of :class:`GPTConfig` that depend on the task, and notes for the user.

    ``head_bias``: whether the family's language-model head has a bias.

    Raises:
        UnsupportedError: see :func:`choose_task`; or a double-heads model has an unsupported score head.
    """
    # A tied head with a bias has one tensor of its own; without it, the file holds only the body.
    tied = reading.values["tied_head"] and (not head_bias or any(_ends_with(n, "lm_head.bias") for n in tensors))
    task = choose_task(heads, reading.raw, reading.path, tensors, request, tied=tied)
    if task == "multiple-choice":
        _require_plain_summary(reading)
    pad = reading.values["pad_token_id"] if request.pad_token_id is None else request.pad_token_id
    notes = _body_notes(heads, reading.raw, task, tensors, request)
    if task == "text-classification" and pad is None:
        notes.append(
            "pad_token_id is not set, so the last token of every sequence is classified: correct for single "
            "sequences, wrong for padded batches (set --pad-token-id)"
        )
    labels = count_labels(task, reading.raw, reading.path, tensors)
    return {"task": task, "n_labels": labels, "pad_token_id": pad}, notes


def _require_plain_summary(reading: Reading) -> None:
    wrong = {k: reading.raw[k] for k, v in SUMMARY_KEYS.items() if k in reading.raw and reading.raw[k] != v}
    wrong.pop("summary_first_dropout", None)
    if wrong:
        listed = ", ".join(f"{key} = {value!r}"[:120] for key, value in wrong.items())
        raise UnsupportedError(
            f"multiple-choice head not implemented: {listed}",
            path=reading.path,
            hint="only a linear score of the token at mc_token_ids is implemented",
        )


def head_config(heads: Mapping[str, str], config: GPTConfig, carried: Mapping[str, object]) -> dict[str, object]:
    """The keys of config.json that describe the head."""
    written: dict[str, object] = {"architectures": [heads[config.task]]}
    if config.n_labels not in (0, 2) and "id2label" not in carried:  # transformers' default is 2
        names = [f"LABEL_{i}" for i in range(config.n_labels)]
        written["id2label"] = {str(i): name for i, name in enumerate(names)}
        written["label2id"] = {name: i for i, name in enumerate(names)}
    return written
