"""Comparing: what was found on disk, which of it may be ranked, and the page that shows it."""
