"""Rows in, token sequences out: readers, prompts, encoding, inspection."""
