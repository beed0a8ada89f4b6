"""Accuracy against acceleration: decode held-out prompts in several ways and report what each way costs and gains."""
