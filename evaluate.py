"""Roll a policy out in an environment, and report success rates with intervals.

python evaluate.py                               # the newest checkpoint, in the embedded tabletop world
python evaluate.py ckpt_path=runs/finetune/2026-01-01_12-00-00/checkpoints/step_000500.ckpt
python evaluate.py env=offline                   # token accuracy and L1 on held-out steps
"""

from openvla_lightning.cli.evaluate import main

if __name__ == "__main__":
    main()
