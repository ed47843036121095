"""Sharing: what is done with an adapter after training."""
