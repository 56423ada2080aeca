"""LIBERO-Plus (Fei et al. 2025): LIBERO's tasks with one change each, as far as packages bring its files."""

from openvla_lightning.env.libero.plus.environment import LiberoPlus

__all__ = ["LiberoPlus"]
