"""Byte formats, one module each for reading and writing. Nothing here depends on a model architecture."""
