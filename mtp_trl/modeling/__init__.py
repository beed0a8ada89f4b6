"""What touches a causal language model: its mask token, adapters, attention masks, logits, and checks of what it can do."""
