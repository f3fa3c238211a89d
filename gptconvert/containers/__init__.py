"""Byte formats: each is read and written in one module. Nothing here knows what a GPT is."""
