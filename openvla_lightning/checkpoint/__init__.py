"""Checkpoints: formats that are read and written, from files on disk to a model and back."""
