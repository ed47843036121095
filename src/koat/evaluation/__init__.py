"""Tasks, scorers, metrics and intervals."""
