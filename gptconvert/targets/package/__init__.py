"""The small files beside the weights: configuration, tokenizer, model card."""
