"""The executable specification: one description of a GPT (`config`) and one PyTorch model of it (`model`)."""

from reference_model.config import ConfigError, GPTConfig, Rotary

__all__ = ["ConfigError", "GPTConfig", "Rotary"]
