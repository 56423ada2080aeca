"""A server for policies: `python -m openvla_lightning.serve ckpt_path=...`; see docs/serving.md."""
