"""Robot demonstrations: RLDS datasets, their standardisation, statistics, mixture and batches."""
