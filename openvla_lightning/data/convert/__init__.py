"""From one form of a dataset to another: RLDS -> LeRobot v3.0, LeRobot -> RLDS, HDF5 -> RLDS.

`python -m openvla_lightning.data.convert` is the command. Every converter shows how far it is, goes on where it was
interrupted, and compares what it wrote with what it read.
"""
