"""Output formats, one folder each: plan, verify, run, and model card snippets."""
