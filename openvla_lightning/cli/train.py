"""Pretrain a VLA on a mixture of robot datasets.

openvla train                                    # a small VLA on the embedded tabletop world, on a laptop
openvla train ckpt_path=last                     # resume the newest run
openvla train +experiment=oxe_full               # the paper's run
openvla train --cfg job --resolve                # print the composed config, run nothing
"""

import hydra
from omegaconf import DictConfig

from openvla_lightning.cli.command import command, lasting_imports
from openvla_lightning.config import CONF


@command("train")
@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run the training of `cfg`."""
    with lasting_imports():  # after Hydra: --help and --cfg stay instant
        from openvla_lightning.run.fit import fit

    return fit(cfg)


if __name__ == "__main__":
    main()
