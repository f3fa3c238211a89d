"""The files published beside the weights: configuration, tokenizer, model card."""
