"""Benchmarks against ``cp`` and PyTorch: ``python -m benchmarks``."""
