"""What a student can learn from a dataset, measured before any training."""
