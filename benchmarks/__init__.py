"""Benchmarks: one file per claim, each against a peer in the same run, after a check that both compute the same."""
