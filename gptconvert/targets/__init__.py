"""Output formats, one folder each: plan, verify, run, and what the model card says."""
