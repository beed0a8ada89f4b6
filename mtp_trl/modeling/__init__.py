"""Changes to a causal language model and passes over it: mask token, adapters, attention masks, logits and checks."""
