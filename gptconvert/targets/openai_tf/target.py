"""The target ``openai-tf``."""

from gptconvert.targets.openai_tf.plan import NAME, TOKENIZER_NAMES, plan
from gptconvert.targets.openai_tf.verify import verify
from gptconvert.targets.target import Target

TARGET = Target(
    name=NAME,
    title="OpenAI's own format (TensorFlow checkpoint; GPT-1: npy)",
    short_title="OpenAI's format",
    plan=plan,
    verify=verify,
    runs=False,
    families=frozenset(TOKENIZER_NAMES),
)
