"""Checkpoints: reading and writing of all formats, from files on disk to a model and back."""
