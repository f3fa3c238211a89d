"""Checkpoint formats: bytes on disk → named lazy tensors and the raw configuration. Independent of model families."""
