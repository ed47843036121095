"""Planning: what a run will take, from configurations alone."""
