"""lm-evaluation-harness: koat as one of its models, its tasks in koat's form, and tasks over local files."""
