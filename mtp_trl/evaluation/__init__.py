"""Measure accuracy against acceleration: decode held-out prompts in several settings and report the results."""
