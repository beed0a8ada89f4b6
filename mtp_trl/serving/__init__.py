"""Adapted models in production engines. Each engine is an extra of its own, and nothing here is imported without it."""
