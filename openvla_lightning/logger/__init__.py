"""Loggers of a run: always CSV, optionally also TensorBoard or Weights & Biases."""

from openvla_lightning.logger.csv_log import CSVLogger
from openvla_lightning.logger.evaluation import log_results
from openvla_lightning.logger.tensorboard import TensorBoardLogger
from openvla_lightning.logger.wandb import WandbLogger

__all__ = ["CSVLogger", "TensorBoardLogger", "WandbLogger", "log_results"]
