"""LeRobot datasets (v2.0, v2.1 and v3.0), read with pyarrow and PyAV."""

from openvla_lightning.data.source.lerobot.source import LeRobot

__all__ = ["LeRobot"]
