"""Adapt a pretrained VLA to one robot.

openvla finetune strategy=lora rank=32           # the newest pretrained checkpoint, the tabletop tasks it has not seen
openvla finetune +experiment=libero_spatial_lora # a released checkpoint, LIBERO's demonstrations
openvla finetune -m strategy=full,last_layer,frozen_vision,sandwich,lora
"""

import hydra
from omegaconf import DictConfig

from openvla_lightning.cli.command import command, lasting_imports
from openvla_lightning.config import CONF


@command("finetune")
@hydra.main(version_base="1.3", config_path=CONF, config_name="finetune")
def main(cfg: DictConfig) -> float | None:
    """Run the fine-tuning of `cfg`."""
    with lasting_imports():  # after Hydra: --help and --cfg stay instant
        from openvla_lightning.run.fit import fit

    return fit(cfg)


if __name__ == "__main__":
    main()
