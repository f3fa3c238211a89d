"""File formats: bytes on disk → named lazy tensors and the raw configuration. Nothing here knows what a GPT is."""
