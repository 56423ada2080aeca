"""Execution of a composed config: checking, building and running."""
