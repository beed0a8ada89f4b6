"""Publish trained models: write decoder, provenance and model card, and push the repository to the Hub in one commit."""
