"""A policy for robots on the network: `python -m openvla_lightning.serve ckpt_path=...`; see docs/serving.md."""
