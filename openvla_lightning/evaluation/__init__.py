"""Evaluation by rollouts or on held-out steps, with all results on disk; see `scoring.evaluate`."""
