"""SimplerEnv (Li et al. 2024): the Bridge and the Google robot simulated, with their own grippers and controllers."""

from openvla_lightning.env.simpler.environment import Simpler
from openvla_lightning.env.simpler.robots import ROBOTS, Robot

__all__ = ["ROBOTS", "Robot", "Simpler"]
