"""A lab's own parts for openvla_lightning: nothing of it is registered anywhere but in pyproject.toml."""
