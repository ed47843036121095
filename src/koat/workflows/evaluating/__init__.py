"""Evaluating: from the names of tasks to scores on disk."""
