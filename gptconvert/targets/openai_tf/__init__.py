"""OpenAI's own formats, written."""
