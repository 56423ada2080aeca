"""Worlds to roll policies out in."""
