"""Rolling a policy out, or predicting held-out steps, all of it on disk: `scoring.evaluate`."""
