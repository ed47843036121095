"""Prefix trees of token sequences: each distinct token goes through the model once."""
