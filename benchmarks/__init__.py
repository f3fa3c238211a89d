"""Measurements side by side with ``cp`` and with PyTorch: ``python -m benchmarks``."""
