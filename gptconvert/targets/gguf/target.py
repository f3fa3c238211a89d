"""The target ``gguf``."""

from gptconvert.targets.gguf import card, layout, plan, run, verify
from gptconvert.targets.target import Target

TARGET = Target(
    name=plan.NAME,
    title="GGUF (llama.cpp, Ollama, LM Studio)",
    short_title="GGUF",
    plan=plan.plan,
    verify=verify.verify,
    load=run.GgufRuntime,
    snippets=card.SNIPPETS,
    graphs=card.graphs,
    library="gguf",
    families=frozenset(layout.ARCHITECTURES),
    refused=layout.REFUSED,
    loses_less="--gguf-type q8_0 or f16",
)
