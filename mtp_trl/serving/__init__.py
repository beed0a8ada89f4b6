"""Serves adapted models in production engines. Each engine is an optional extra and is imported only when it is used."""
