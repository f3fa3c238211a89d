"""The executable specification: a description of GPT architectures (`config`) and a PyTorch model (`model`)."""

from reference_model.config import ConfigError, GPTConfig, Rotary

__all__ = ["ConfigError", "GPTConfig", "Rotary"]
