"""Pretrain a VLA on a mixture of robot datasets.

python train.py                                  # a small VLA on the embedded tabletop world, on a laptop
python train.py ckpt_path=last                   # resume the newest run
python train.py +experiment=oxe_full             # the paper's run
python train.py --cfg job --resolve              # print the composed config, run nothing
"""

import hydra
from omegaconf import DictConfig

from openvla_lightning.config import command


@command("train")
@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train what `cfg` describes."""
    from openvla_lightning.run import fit  # after Hydra: --help and --cfg stay instant

    return fit(cfg)


if __name__ == "__main__":
    main()
