"""The target ``safetensors``."""

from gptconvert.targets.safetensors import card, plan, run, verify
from gptconvert.targets.target import Target

TARGET = Target(
    name=plan.NAME,
    title="safetensors, Hugging Face layout",
    short_title="safetensors",
    plan=plan.plan,
    verify=verify.verify,
    runs=False,
    load=run.TorchRuntime,
    snippets=card.SNIPPETS,
    library="transformers",
    libraries=("huggingface_hub",),
)
