"""Pretrain a VLA on a mixture of robot datasets.

python train.py                                  # a small VLA on the embedded tabletop world, on a laptop
python train.py ckpt_path=last                   # resume the newest run
python train.py +experiment=oxe_full             # the paper's run
python train.py --cfg job --resolve              # print the composed config, run nothing
"""

from openvla_lightning.cli.train import main

if __name__ == "__main__":
    main()
