"""The GPT families, one file each: configuration tables and tensor name tables."""
