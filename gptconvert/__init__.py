"""Convert GPT checkpoints to artifacts that run elsewhere, and prove that each computes the same."""

__version__ = "0.1.0"
