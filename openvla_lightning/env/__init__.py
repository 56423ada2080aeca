"""Worlds for rollouts of policies."""
