"""Safetensors in the Hugging Face layout."""
