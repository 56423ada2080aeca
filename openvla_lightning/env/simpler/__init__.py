"""SimplerEnv (Li et al. 2024): simulations of the Bridge and Google robots with their grippers and controllers."""

from openvla_lightning.env.simpler.environment import Simpler
from openvla_lightning.env.simpler.robots import ROBOTS, Robot

__all__ = ["ROBOTS", "Robot", "Simpler"]
