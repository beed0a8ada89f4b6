"""From a training folder to a repository on the Hub: decoder, provenance, card, and a push in one commit."""
