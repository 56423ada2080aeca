"""Conversion of datasets: RLDS -> LeRobot v3.0, LeRobot -> RLDS, HDF5 -> RLDS.

`python -m openvla_lightning.data.convert` is the command. Every converter shows its progress, resumes after an
interruption, and compares its output with its input.
"""
