"""Where steps come from: RLDS folders, or random ones. tfds is imported here and nowhere else."""
