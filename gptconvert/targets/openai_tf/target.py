"""The target ``openai-tf``."""

from gptconvert.targets.openai_tf import plan, verify
from gptconvert.targets.target import Target

TARGET = Target(
    name=plan.NAME,
    title="OpenAI's own format (TensorFlow checkpoint; GPT-1: npy)",
    short_title="OpenAI's format",
    plan=plan.plan,
    verify=verify.verify,
    runs=False,
    families=frozenset(plan.TOKENIZER_NAMES),
)
