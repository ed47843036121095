"""Quantised base models through bitsandbytes: loading, what the weights stand for, and a start-up check."""
