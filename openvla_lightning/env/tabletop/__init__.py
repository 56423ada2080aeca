"""A small world with an arm, a parallel gripper, coloured objects, two plates, and instructions in words."""

from openvla_lightning.env.tabletop.embodiment import EMBODIMENTS, Embodiment
from openvla_lightning.env.tabletop.environment import TRAINING_SEEDS, Tabletop
from openvla_lightning.env.tabletop.expert import expert
from openvla_lightning.env.tabletop.tasks import TabletopTask

__all__ = ["EMBODIMENTS", "TRAINING_SEEDS", "Embodiment", "Tabletop", "TabletopTask", "expert"]
