"""Hugging Face checkpoints: file names, shards, and the containers that transformers has used."""
