"""Export to OpenAI's formats."""
