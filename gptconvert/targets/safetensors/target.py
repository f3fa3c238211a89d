"""The target ``safetensors``."""

from gptconvert.targets.safetensors.card import SNIPPETS
from gptconvert.targets.safetensors.plan import NAME, plan
from gptconvert.targets.safetensors.run import TorchRuntime
from gptconvert.targets.safetensors.verify import verify
from gptconvert.targets.target import Target

TARGET = Target(
    name=NAME,
    title="safetensors, Hugging Face layout",
    short_title="safetensors",
    plan=plan,
    verify=verify,
    runs=False,
    load=TorchRuntime,
    snippets=SNIPPETS,
    library="transformers",
    libraries=("huggingface_hub",),
)
