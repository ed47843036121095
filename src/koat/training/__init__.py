"""The loop, its sampler, its checkpoints."""
