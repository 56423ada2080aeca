"""Fit a FAST tokenizer on the actions of a mixture, for `action_head=fast`.

openvla fit-fast                                                   # on the embedded world's demonstrations
openvla fit-fast data=oxe data/mix=bridge data.action_chunk=5
openvla train action_head=fast action_head.tokenizer=runs/fast/... data.action_chunk=8
"""

import hydra
from omegaconf import DictConfig

from openvla_lightning.cli.command import command, lasting_imports
from openvla_lightning.config import CONF


@command("fit_fast")
@hydra.main(version_base="1.3", config_path=CONF, config_name="fit_fast")
def main(cfg: DictConfig) -> None:
    """Fit a tokenizer on the mixture of `cfg`."""
    with lasting_imports():  # after Hydra: --help and --cfg stay instant
        from openvla_lightning.run.fast import fit_fast

    fit_fast(cfg)


if __name__ == "__main__":
    main()
