"""Look at the datasets of a mixture before training on them.

python -m openvla_lightning.data.report                            # the embedded world's demonstrations
python -m openvla_lightning.data.report data=oxe data/mix=bridge paths.data_dir=/big/disk/rlds
python -m openvla_lightning.data.report data=oxe data/mix=oxe_magic_soup_plus data.noop_filter=near_zero
"""

import hydra
from omegaconf import DictConfig

from openvla_lightning.cli.command import command, lasting_imports
from openvla_lightning.config import CONF


@command("data_report")
@hydra.main(version_base="1.3", config_path=CONF, config_name="data_report")
def main(cfg: DictConfig) -> None:
    """Report on the mixture that `cfg` describes."""
    with lasting_imports():  # after Hydra: --help and --cfg stay instant
        from openvla_lightning.run.start import data_report

    data_report(cfg)


if __name__ == "__main__":
    main()
