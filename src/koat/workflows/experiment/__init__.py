"""Experiments: one file of variants, seeds and tasks, done as far as it is missing, ending in a comparison."""
