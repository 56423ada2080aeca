"""Adapt a pretrained VLA to one robot: train.py with another start, dataset and strategy.

python finetune.py strategy=lora rank=32         # the newest run of train.py, on the new tabletop tasks
python finetune.py +experiment=libero_spatial_lora
python finetune.py -m strategy=full,last_layer,frozen_vision,sandwich,lora
"""

from openvla_lightning.cli.finetune import main

if __name__ == "__main__":
    main()
