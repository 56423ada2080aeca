"""A report on the datasets of a mixture, to read before training on them.

`python -m openvla_lightning.data.report data=oxe data/mix=bridge` (`__main__.py`) writes tables, pictures and verdicts.
"""
