"""Adapt a pretrained VLA to one robot: train.py with another start, dataset and strategy.

python finetune.py strategy=lora rank=32         # the newest run of train.py, on the new tabletop tasks
python finetune.py +experiment=libero_spatial_lora
python finetune.py -m strategy=full,last_layer,frozen_vision,sandwich,lora
"""

import hydra
from omegaconf import DictConfig

from openvla_lightning.config import command


@command("finetune")
@hydra.main(version_base="1.3", config_path="conf", config_name="finetune")
def main(cfg: DictConfig) -> float | None:
    """Fine-tune what `cfg` describes."""
    from openvla_lightning.run import fit  # after Hydra: --help and --cfg stay instant

    return fit(cfg)


if __name__ == "__main__":
    main()
