"""Roll a policy out in an environment, and report success rates with intervals.

openvla evaluate                                 # the newest checkpoint, in the embedded tabletop world
openvla evaluate ckpt_path=runs/finetune/2026-01-01_12-00-00/checkpoints/step_000500.ckpt
openvla evaluate env=offline                     # token accuracy and L1 on held-out steps
"""

import hydra
from omegaconf import DictConfig

from openvla_lightning.cli.command import command, lasting_imports
from openvla_lightning.config import CONF


@command("evaluate")
@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Run the evaluation of `cfg`."""
    with lasting_imports():  # after Hydra: --help and --cfg stay instant
        from openvla_lightning.run.evaluate import evaluate

    return evaluate(cfg)


if __name__ == "__main__":
    main()
