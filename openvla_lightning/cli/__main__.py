"""`python -m openvla_lightning.cli` is `openvla`."""

from openvla_lightning.cli.commands import main

main()
