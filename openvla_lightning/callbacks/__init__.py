"""Lightning callbacks for progress, logs, warnings, checkpoints and the files that a run writes."""

from openvla_lightning.callbacks.collapse import CollapseWarning
from openvla_lightning.callbacks.costs import Costs
from openvla_lightning.callbacks.early_stopping import EarlyStopping
from openvla_lightning.callbacks.expected import ExpectedCurve
from openvla_lightning.callbacks.learning_curve import LearningCurve
from openvla_lightning.callbacks.non_finite import NonFiniteError, StopOnNonFinite
from openvla_lightning.callbacks.progress import Progress
from openvla_lightning.callbacks.samples import Samples
from openvla_lightning.callbacks.save_checkpoints import Checkpoint
from openvla_lightning.callbacks.save_statistics import SaveDatasetStatistics
from openvla_lightning.callbacks.served_steps import ServedSteps
from openvla_lightning.callbacks.throughput import Throughput

__all__ = [
    "Checkpoint",
    "CollapseWarning",
    "Costs",
    "EarlyStopping",
    "ExpectedCurve",
    "LearningCurve",
    "NonFiniteError",
    "Progress",
    "Samples",
    "SaveDatasetStatistics",
    "ServedSteps",
    "StopOnNonFinite",
    "Throughput",
]
