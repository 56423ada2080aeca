"""The tabletop world that executes its own expert's actions, whatever a policy says."""

import numpy as np

from openvla_lightning.env.tabletop import Tabletop, expert


class ExpertDriven(Tabletop):
    """Any policy succeeds here."""

    def step(self, action: np.ndarray) -> tuple:
        """Take the expert's action."""
        return super().step(expert(self))
