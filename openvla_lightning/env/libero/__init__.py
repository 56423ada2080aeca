"""LIBERO (Liu et al. 2023), evaluated as in the paper. It needs the extra `libero`."""

from openvla_lightning.env.libero.environment import Libero
from openvla_lightning.env.libero.plus import LiberoPlus
from openvla_lightning.env.libero.protocol import STEP_LIMITS

__all__ = ["STEP_LIMITS", "Libero", "LiberoPlus"]
